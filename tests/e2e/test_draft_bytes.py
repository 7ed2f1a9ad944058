"""The announced draft cost is what was copied: doctor, the engine and a count of the copies agree on every model (runner v1)."""

import re

import pytest
from safetensors.torch import load_file
from support.engine_host import EngineHost
from support.tiny_models import build

SIRIUS = {"method": "sirius", "kernel_size": 4, "adaptive": False, "prompt_lookup_tokens": 0}
COST = re.compile(r"a draft step keeps (\d+)% of the bytes, predicted draft cost ([\d.]+) of")
COPIED = re.compile(r"Sirius: copied (\d+) layers to (\w+) in [\d.]+ s")

CASES = [
    # Model, dtype, and the embedding that a step only looks up. EXAONE's layers are called h; InternLM2's head is called
    # output; Cohere's head is the embedding itself.
    ("llama", "bfloat16", "model.embed_tokens.weight"),
    ("llama", "float32", "model.embed_tokens.weight"),
    ("exaone", "bfloat16", "transformer.wte.weight"),
    ("internlm2", "bfloat16", "model.tok_embeddings.weight"),
    ("cohere", "bfloat16", None),
]

OTHERS = [
    {"sparsity": "coarse", "draft_weights": "int8", "density": 0.3},
    {"sparsity": "fine", "draft_weights": "shared"},
    {"draft_weights": "int4", "draft_weights_scope": "ffn"},
]


@pytest.fixture(scope="module")
def v1():
    with EngineHost() as host:
        host.probe_static("support.start_lines:listen")
        yield host


@pytest.fixture(scope="module")
def doctors(tmp_path_factory):
    """What doctor says of every case, in a process without engines, and the model's folder."""
    root = tmp_path_factory.getbasetemp().parent / "tiny-models"
    asked = [*((name, dtype, {}) for name, dtype, _ in CASES), *(("llama", "bfloat16", options) for options in OTHERS)]
    found = {}
    with EngineHost() as host:
        for name, dtype, options in asked:
            path = str(build(name, root))
            plan = host.probe_static("support.copies:doctor", model=path, dtype=dtype, options=options)
            found[name, dtype, str(options)] = (path, plan)
    return found


@pytest.mark.parametrize(("name", "dtype", "looked_up"), CASES)
def test_doctor_engine_and_copies_agree(v1, doctors, name, dtype, looked_up):
    path, doctor = doctors[name, dtype, "{}"]
    v1.probe_static("support.start_lines:heard")
    engine = {"model": path, "dtype": dtype, "max_model_len": 64, "max_num_seqs": 2, "speculative_config": SIRIUS}
    report = v1.probe(engine, "support.copies:copies_report")
    lines = "\n".join(v1.probe_static("support.start_lines:heard"))

    weights = load_file(f"{path}/model.safetensors")
    size = {"bfloat16": 2, "float32": 4}[dtype]
    dense = size * sum(weight.numel() for key, weight in weights.items() if key != looked_up)
    vectors = size * sum(weight.numel() for weight in weights.values() if weight.dim() == 1)
    # Two projections of attention in each of three layers, and the head.
    assert (report["linears"], report["head"]) == (6, True)
    assert COPIED.search(lines).groups() == ("13", "int4")
    assert doctor["step_bytes"] == dense
    assert doctor["copied_bytes"] == report["bytes"]
    counted = (vectors + report["bytes"]) / dense
    assert doctor["density"] == pytest.approx(counted, rel=1e-9)
    percent, cost = COST.search(lines).groups()
    assert (int(percent), float(cost)) == (round(100 * counted), round(counted, 2))


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_other_drafts_agree_too(v1, doctors, options):
    path, doctor = doctors["llama", "bfloat16", str(options)]
    v1.probe_static("support.start_lines:heard")
    options = {**SIRIUS, **options}
    engine = {"model": path, "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 2, "speculative_config": options}
    copied = v1.probe(engine, "support.copies:copies_report")["bytes"]
    percent, cost = COST.search("\n".join(v1.probe_static("support.start_lines:heard"))).groups()
    assert doctor["copied_bytes"] == copied
    assert (int(percent), float(cost)) == (round(100 * doctor["density"]), round(doctor["density"], 2))
