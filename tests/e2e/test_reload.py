"""New weights in a running engine: the draft follows, as if the engine had started with them, and memory stays the same."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine_host import EngineError
from support.runners import only_v1, only_v2
from support.tiny_models import build

PROMPTS = [[random.Random(seed).randrange(256) for _ in range(length)] for seed, length in enumerate((5, 17))]
SAMPLING = {"max_tokens": 16, "ignore_eos": True}
LOSSLESS = {"method": "sirius", "acceptance": "lossless", "kernel_size": 5, "adaptive": False}
RELOAD = "support.copies:reload"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two models that differ in their weights alone. The lm_head is tied, which upstream's own reload forgets to pack."""
    root = tmp_path_factory.getbasetemp().parent / "tiny-models"
    return [str(build("llama_tied", root, variant)) for variant in range(2)]


def engine(path, options, **more):
    return {
        "model": path,
        "max_model_len": 64,
        "max_num_seqs": 2,
        "speculative_config": {**LOSSLESS, **options},
        **more,
    }


CASES = [
    pytest.param({}, {}, id="int4"),
    pytest.param({"sparsity": "coarse", "draft_weights": "int8"}, {}, id="int8-coarse"),
    pytest.param({"sparsity": "fine", "draft_weights": "shared"}, {}, id="rows-fine", marks=pytest.mark.slow),
    pytest.param({"target_kernels": "sirius"}, {"dtype": "bfloat16"}, id="panels-of-the-target"),
    pytest.param(
        {"target_kernels": "sirius"},
        {"dtype": "bfloat16", "enforce_eager": False},
        id="panels-compiled",
        marks=pytest.mark.slow,
    ),
    pytest.param({}, {"enforce_eager": False}, id="int4-compiled", marks=pytest.mark.slow),
]


@only_v1
@pytest.mark.parametrize(("options", "more"), CASES)
def test_a_reloaded_engine_is_one_that_started_with_the_weights(host, paths, options, more):
    check_reload(host, paths, options, more)


@only_v2
def test_a_reloaded_engine_is_one_that_started_with_the_weights_v2(host, paths):
    check_reload(host, paths, {}, {})


def check_reload(host, paths, options, more):
    first, other = (engine(path, options, **more) for path in paths)
    expected = host.generate(other, PROMPTS, SAMPLING)
    before = host.generate(first, PROMPTS, SAMPLING)
    assert before.token_ids != expected.token_ids
    start = host.probe(first, "support.copies:copies_report")
    for path, iterate, answers in ((paths[1], False, expected), (paths[0], True, before), (paths[0], False, before)):
        after = host.probe(first, RELOAD, path=path, iterate=iterate)
        # Tokens and acceptance alike.
        assert host.generate(first, PROMPTS, SAMPLING) == answers
        assert after == start


@only_v1
def test_what_the_draft_cannot_follow_is_refused(host, paths, tmp_path):
    running = engine(paths[0], {})
    before = host.generate(running, PROMPTS, SAMPLING)
    with pytest.raises(EngineError, match="is_checkpoint_format=True, or start a new engine"):
        host.probe(running, RELOAD, path=paths[1], is_checkpoint_format=False)
    with pytest.raises(EngineError, match=r"follow new weights only through reload_weights"):
        host.probe(running, "support.copies:load_past_the_engine", path=paths[1])
    assert host.generate(running, PROMPTS, SAMPLING) == before
    broken = shutil.copytree(paths[0], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][3, 5] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match=r"not finite: model\.layers\.1\.self_attn\.o_proj\.weight \(NaN\)"):
        host.probe(running, RELOAD, path=str(broken))
    host.probe(running, RELOAD, path=paths[0])
    assert host.generate(running, PROMPTS, SAMPLING) == before
