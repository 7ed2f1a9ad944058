"""Where weights come from: load formats with loaders of their own, checkpoints whose values are not finite (runner v1)."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine_host import EngineError, EngineHost
from support.tiny_models import build

PROMPTS = [[random.Random(seed).randrange(256) for _ in range(length)] for seed, length in enumerate((5, 17))]
SAMPLING = {"max_tokens": 12, "ignore_eos": True}
SIRIUS = {"method": "sirius", "acceptance": "lossless", "kernel_size": 4, "adaptive": False}


def engine(path, **options):
    return {"model": str(path), "max_model_len": 64, "max_num_seqs": 2, "speculative_config": SIRIUS, **options}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build("llama", tmp_path_factory.getbasetemp().parent / "tiny-models")


@pytest.fixture(scope="module")
def v1(llama, tmp_path_factory):
    with EngineHost() as host:
        host.probe_static("support.loaders:register_loaders")
        host.sharded = shutil.copytree(llama, tmp_path_factory.mktemp("sharded") / "model")
        (host.sharded / "model.safetensors").unlink()
        host.probe_static("support.loaders:save_sharded", model=str(llama), folder=str(host.sharded))
        yield host


def test_loaders_that_build_the_model_by_upstreams_seam_serve_v1(v1, llama):
    expected = v1.generate(engine(llama), PROMPTS, SAMPLING)
    assert expected.num_accepted_tokens > 0
    assert v1.generate(engine(llama, load_format="by_create_model"), PROMPTS, SAMPLING) == expected
    assert v1.generate(engine(v1.sharded, load_format="sharded_state"), PROMPTS, SAMPLING) == expected


def test_dummy_weights_serve_v1(v1, llama):
    assert v1.generate(engine(llama, load_format="dummy"), PROMPTS, SAMPLING).num_drafts > 0


def test_a_loader_that_builds_the_model_by_itself_is_refused_v1(v1, llama):
    with pytest.raises(EngineError) as refusal:
        v1.generate(engine(llama, load_format="by_itself"), PROMPTS, SAMPLING)
    assert "SiriusUnsupportedError" in str(refusal.value)
    assert "load_format='by_itself'" in str(refusal.value)
    assert "'safetensors'" in str(refusal.value)


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"model.layers.1.mlp.down_proj.weight": torch.nan}, "model.layers.1.mlp.down_proj.weight (NaN)"),
        (
            {
                "model.layers.0.self_attn.k_proj.weight": torch.inf,
                "model.layers.2.input_layernorm.weight": torch.nan,
                "lm_head.weight": -torch.inf,
            },
            # In the order in which they are read: linear layers, the head, norms.
            (
                "model.layers.0.self_attn.qkv_proj.weight (infinite values), lm_head.weight (infinite values), "
                "model.layers.2.input_layernorm.weight (NaN)"
            ),
        ),
    ],
    ids=["ffn", "everything-else"],
)
def test_values_that_are_not_finite_are_named_v1(v1, llama, tmp_path, faults, words):
    broken = shutil.copytree(llama, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    for name, value in faults.items():
        weights[name].view(-1)[5] = value
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError) as refusal:
        v1.generate(engine(broken), PROMPTS, SAMPLING)
    assert f"not finite: {words}." in str(refusal.value)
    assert "repair or download the checkpoint again" in str(refusal.value)
    assert "another plugin" not in str(refusal.value)
