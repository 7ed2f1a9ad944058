"""Set-ups that Sirius cannot serve are refused before weights load, by option, value and remedy; the full list."""

import pytest
from support.real_models import SMOL, model_path
from support.runners import only_v1
from support.tiny_models import build

SIRIUS = {"method": "sirius"}

REFUSED_SETUPS = [
    ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size=2", "--tensor-parallel-size"]),
    ({"tensor_parallel_size": 3}, ["tensor_parallel_size=3 on CPU", "its own clock", "tensor_parallel_size=1"]),
    ({"enable_lora": True}, ["enable_lora", "merge the adapter"]),
    ({"runner": "pooling"}, ["runner=pooling", "text generation only"]),
    (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        ["kv_connector=", "--kv-transfer-config"],
    ),
    ({"worker_cls": "some.other.Worker"}, ["worker_cls='some.other.Worker'", "--worker-cls"]),
    ({"speculative_config": {**SIRIUS, "density": 2}}, ["density=2", "(0, 1]"]),
    ({"speculative_config": {**SIRIUS, "unknown": 2}}, ["'unknown'", "known options"]),
    ({"speculative_config": {**SIRIUS, "model": "other/draft"}}, ["model='other/draft'", "drop 'model'"]),
    ({"speculative_config": {"model": "sirius", "method": "ngram"}}, ["method='ngram'", "drop 'method'"]),
    ({"speculative_config": SIRIUS, "spec_method": "sirius"}, ["--spec-method", "mutually exclusive"]),
    (
        {"speculative_config": {**SIRIUS, "num_speculative_tokens": 3}, "spec_tokens": 4},
        ["--spec-tokens=4", "mutually exclusive"],
    ),
]


@pytest.mark.parametrize(("options", "words"), REFUSED_SETUPS, ids=lambda value: str(value)[:70])
def test_setup_is_refused(host, options, words):
    engine = {"model": model_path(SMOL), "speculative_config": SIRIUS, **options}
    answer = host.probe_config(engine)
    assert answer is not None, "the engine config was accepted"
    assert all(word in answer for word in words), answer


@only_v1
def test_noise_that_upstream_draws_otherwise_is_refused(host):
    answer = host.probe_config({"model": model_path(SMOL), "speculative_config": SIRIUS, "use_fp64_gumbel": True})
    assert answer is not None, "the engine config was accepted"
    assert all(word in answer for word in ("use_fp64_gumbel=True on Model Runner V1", "use_fp64_gumbel=False")), answer


@only_v1
def test_experts_whose_ranks_meet_in_every_pass_are_refused(host, tmp_path_factory):
    model = build("qwen3_moe_dense_first", tmp_path_factory.getbasetemp().parent / "tiny-models")
    answer = host.probe_config({"model": str(model), "speculative_config": SIRIUS, "data_parallel_size": 2})
    assert answer is not None, "the engine config was accepted"
    words = ("data_parallel_size=2 on CPU with a mixture of experts", "its own clock", "data_parallel_size=1")
    assert all(word in answer for word in words), answer


@pytest.fixture(scope="module")
def rules(host):
    """Each rule of `engine_support.RULES`, fed a config that differs from a good one in nothing else."""
    return host.probe_static("support.engine_rules:fire_every_rule", model=model_path(SMOL))


def test_every_rule_of_the_engine_check_can_fire(rules):
    assert rules["good"] is None
    assert len(rules["fired"]) == rules["num_rules"]
    for rule, message in rules["fired"].items():
        assert message is not None, f"rule {rule} did not fire"
        assert message.startswith("speculative method 'sirius' with ")
        assert ";" in message.split(":", 1)[1] or "use" in message, message


def test_a_gpu_forced_to_runner_v1_is_refused_with_the_remedy(rules):
    assert "Model Runner V1 on a GPU" in rules["fired"]["v1 on a gpu"]
    assert "unset VLLM_USE_V2_MODEL_RUNNER" in rules["fired"]["v1 on a gpu"]
