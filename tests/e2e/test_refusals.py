"""Set-ups that Sirius cannot serve are refused before weights load, by option, value and remedy; the full list."""

import pytest
from support.engine_host import EngineError
from support.real_models import SMOL, model_path

SIRIUS = {"method": "sirius"}

REFUSED_SETUPS = [
    ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size=2", "--tensor-parallel-size"]),
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
def test_setup_is_refused_v1(host, options, words):
    engine = {"model": model_path(SMOL), "speculative_config": SIRIUS, **options}
    answer = host.probe_config(engine)
    assert answer is not None, "the engine config was accepted"
    assert all(word in answer for word in words), answer


def test_every_rule_of_the_engine_check_can_fire_v1(host):
    """Each rule of `engine_support.RULES`, fed a config that differs from a good one in nothing else."""
    report = host.probe_static("support.probes:fire_every_rule", model=model_path(SMOL))
    assert report["good"] is None
    assert len(report["fired"]) == report["num_rules"]
    for rule, message in report["fired"].items():
        assert message is not None, f"rule {rule} did not fire"
        assert message.startswith("speculative method 'sirius' with ")
        assert ";" in message.split(":", 1)[1] or "use" in message, message


def test_v2_runner_is_refused_with_the_remedy(tmp_path):
    from support.engine_host import EngineHost

    with (
        EngineHost({"VLLM_USE_V2_MODEL_RUNNER": "1"}) as host,
        pytest.raises(EngineError, match=r"Model Runner V2|Triton"),
    ):
        host.generate({"model": model_path(SMOL), "speculative_config": SIRIUS}, [[1, 2, 3]], {"max_tokens": 2})
