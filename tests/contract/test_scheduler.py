"""Which scheduler an engine gets, and that Sirius's schedulers stand on vLLM's. CPU engines never schedule async, GPUs do."""

import pytest
from support.engine_host import runner_environment
from support.real_models import SMOL, model_path
from test_hooks import ask

SCHEDULE = "num_speculative_tokens_per_batch_size"
SIRIUS = {"method": "sirius", "kernel_size": 8}


def probe_scheduler(model, options, async_scheduling=False, scheduler_cls=None):
    """What the configuration of an engine came to."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm_sirius.integration import engine_support

    engine = EngineArgs(model=model, max_model_len=128, speculative_config=options, scheduler_cls=scheduler_cls)
    config = engine.create_engine_config()
    if async_scheduling:
        config.scheduler_config.scheduler_cls = None
        config.scheduler_config.async_scheduling = True
        engine_support.choose_scheduler(config)
    speculative = config.speculative_config
    return {
        "class": config.scheduler_config.get_scheduler_cls().__qualname__,
        "bases": [base.__qualname__ for base in config.scheduler_config.get_scheduler_cls().__mro__],
        "lengths": getattr(speculative, "adaptive_lengths", None),
        "schedule": speculative.num_speculative_tokens_per_batch_size,
    }


def probe_observations(steps):
    """What a scheduler tells the policy of steps: drafts scheduled, tokens scheduled and sampled by request, the new length."""
    from types import SimpleNamespace

    from vllm_sirius.integration.scheduler import SiriusAsyncScheduler

    found = []
    scheduler = object.__new__(SiriusAsyncScheduler)
    scheduler.draft_lengths = SimpleNamespace(
        observe_verdicts=lambda verdicts: found.append(["verdicts", *map(list, verdicts)]),
        observe_step=lambda num_rows, length, seconds: found.append(["step", num_rows, length, seconds]),
    )
    for step in steps:
        output = SimpleNamespace(
            scheduled_spec_decode_tokens={name: [-1] * count for name, count in step["drafts"].items()},
            num_scheduled_tokens=step["scheduled"],
            num_spec_tokens_to_schedule=step["length"],
            scheduled_new_reqs=step.get("new", []),
        )
        sampled = step["sampled"]
        answer = SimpleNamespace(
            sampled_token_ids=[[7] * count for count in sampled.values()],
            req_id_to_index={name: place for place, name in enumerate(sampled)},
        )
        scheduler._observe(output, answer, 0.25)
    return found


CASES = {
    # options, whether scheduling is async, the user's scheduler class
    "sync": (SIRIUS, False, None),
    "async": (SIRIUS, True, None),
    "fixed": ({**SIRIUS, "adaptive": False}, False, None),
    "schedule": ({**SIRIUS, SCHEDULE: [[1, 2, 5]]}, False, None),
    "own class": (SIRIUS, False, "vllm.v1.core.sched.scheduler.Scheduler"),
}


def probe_schedulers(model, cases):
    """`probe_scheduler` of several cases in one process."""
    return {name: probe_scheduler(model, *case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def on_v2():
    return ask(probe_schedulers, model_path(SMOL), CASES, environment=runner_environment("v2"))


@pytest.mark.parametrize("case", ["sync", "async"])
def test_lengths_adapt_on_model_runner_v2(on_v2, case):
    found = on_v2[case]
    assert found["class"] == {"sync": "SiriusScheduler", "async": "SiriusAsyncScheduler"}[case]
    assert ("AsyncScheduler" in found["bases"]) == (case == "async")
    assert found["lengths"] == [0, 1, 3, 7]
    # Every length once: CUDA graphs are captured for each.
    assert found["schedule"] == [[1, 1, 7], [2, 2, 3], [3, 3, 1], [4, 4, 0]]


@pytest.mark.parametrize("case", ["fixed", "schedule", "own class"])
def test_the_scheduler_stays_vllms_where_it_need_not_choose(on_v2, case):
    found = on_v2[case]
    assert found["class"] == "Scheduler"
    assert found["lengths"] is None
    assert found["schedule"] == ([[1, 2, 5]] if case == "schedule" else None)


def test_on_model_runner_v1_the_worker_chooses():
    found = ask(probe_scheduler, model_path(SMOL), SIRIUS, environment=runner_environment("v1"))
    assert (found["class"], found["lengths"], found["schedule"]) == ("Scheduler", None, None)


def test_only_steps_of_one_length_are_timed():
    steady = {"drafts": {"a": 3, "b": 3}, "scheduled": {"a": 4, "b": 4}, "sampled": {"a": 2, "b": 4}, "length": 3}
    steps = [
        steady,
        {**steady, "length": 1},  # drafts of another length are under way
        {**steady, "scheduled": {"a": 4, "b": 9}, "drafts": {"a": 3}, "sampled": {"a": 1, "b": 0}},  # b is in prefill
        {**steady, "new": ["b"]},
        {"drafts": {}, "scheduled": {"a": 1}, "sampled": {"a": 1}, "length": 0},
        {**steady, "sampled": {"a": 1}},  # b was aborted
    ]
    found = ask(probe_observations, steps, environment=runner_environment("v1"))
    both = ["verdicts", [3, 1], [3, 3]]
    assert found == [
        both,
        ["step", 2, 3, 0.25],
        both,
        ["verdicts", [3, 0]],
        both,
        ["verdicts"],
        ["step", 1, 0, 0.25],
        ["verdicts", [3, 0]],
        ["step", 2, 3, 0.25],
    ]
