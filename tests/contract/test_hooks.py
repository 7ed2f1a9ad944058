"""The hooks fit the installed vLLM, the ledger says what they are, and nobody else notices them.

vLLM is imported in other processes only: `ask` runs one of the probes of `hook_probes` there and returns what it found.
"""

from __future__ import annotations

import inspect
import os
import re
from importlib import metadata

import pytest
from hook_probes import (
    probe_absence,
    probe_behaviour,
    probe_installation,
    probe_refusal,
    probe_speculator,
)
from support.engine_host import Child, runner_environment
from support.real_models import ROOT, SMOL, model_path

LEDGER = ROOT / "patches" / "README.md"
FIELDS = ["Process", "Fingerprint", "Why", "Delta", "Untouched", "Test", "Upstream", "Patch", "Remove when"]
PROCESSES = {
    "every": "every process that loads the plugin",
    "worker": "worker of an engine with Sirius on Model Runner V1",
}


def ask(probe, *arguments, environment=None, patched_copy=None):
    """Runs a probe in a process of its own, on the installed vLLM or on the copy in a folder.

    vLLM is imported there and nothing of the plugin's, as in a program that begins with ``from vllm import LLM``.
    """
    server = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
    server |= {"PYTHONPATH": runner_environment("v1")["PYTHONPATH"], "VLLM_LOGGING_LEVEL": "ERROR"}
    if patched_copy is not None:
        server["PYTHONPATH"] = os.pathsep.join([str(patched_copy), server["PYTHONPATH"]])
    variables = {**server, **(environment or {})}
    with Child(variables, server={**server, "PYTHONPATH": variables["PYTHONPATH"]}) as child:
        return child.call(f"{inspect.getfile(probe)}:{probe.__name__}", *arguments)


def read_ledger():
    """Fields of each hook in the ledger, and the fingerprints of the symbols that attachments rely on."""
    text = LEDGER.read_text()
    hooks_part, _, rest = text.partition("## Source patches")
    hooks = {}
    for section in hooks_part.split("\n### ")[1:]:
        target = section.partition("\n")[0].strip("`")
        rows = re.findall(r"^\| ([A-Z][a-z ]+) \| (.+) \|$", section, re.MULTILINE)
        hooks[target] = dict(rows)
        assert [name for name, _ in rows] == FIELDS, target
    relied_on = dict(re.findall(r"^\| `(vllm\.[^`]+:[^`]+)` \| `([0-9a-f]{12})` \|", rest, re.MULTILINE))
    return hooks, relied_on


@pytest.fixture(scope="module")
def installation():
    return ask(probe_installation, list(read_ledger()[1]))


@pytest.fixture(scope="module", params=["hooks", "patches"])
def copy_or_none(request):
    """Both ways of attachment: the installed vLLM gets hooks, the patched copy calls the plugin by itself."""
    return request.getfixturevalue("patched_copy") if request.param == "patches" else None


@pytest.fixture(scope="module")
def behaviour(copy_or_none):
    return ask(probe_behaviour, model_path(SMOL), patched_copy=copy_or_none)


def test_ledger_lists_exactly_the_hooks_of_the_code(installation):
    ledger = read_ledger()[0]
    assert list(ledger) == [hook["target"] for hook in installation["hooks"]]
    for hook in installation["hooks"]:
        row = ledger[hook["target"]]
        assert row["Process"] == PROCESSES[hook["process"]]
        assert row["Fingerprint"] == f"`{hook['pinned']}`"
        assert row["Why"] == hook["why"]
        assert row["Untouched"] == hook["untouched"]
        assert row["Remove when"] == hook["remove_when"]


def test_every_hook_has_the_test_that_the_ledger_names():
    for target, row in read_ledger()[0].items():
        path, _, name = row["Test"].strip("`").partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), target


def test_hooked_symbols_are_the_ones_the_hooks_were_written_for(installation):
    assert {hook["target"]: hook["found"] for hook in installation["hooks"]} == {
        hook["target"]: hook["pinned"] for hook in installation["hooks"]
    }
    for hook in installation["hooks"]:
        if not hook["constant"]:
            assert f"{os.sep}vllm{os.sep}" in hook["upstream_code"], "somebody else replaced it first"


def test_symbols_that_attachments_rely_on_are_unchanged(installation):
    relied_on = read_ledger()[1]
    assert len(relied_on) >= 10
    assert installation["relied_on"] == relied_on


def test_plugin_installs_its_hooks_and_leaves_those_of_the_worker(installation):
    assert installation["reason"] is None
    assert installation["installed_before"] == []
    assert installation["installed"] == [hook["target"] for hook in installation["hooks"] if hook["process"] == "every"]


def test_register_is_idempotent(installation):
    assert installation["wrapped_once"] == installation["installed"]


def test_wrappers_take_what_the_originals_take_and_keep_them(installation):
    assert installation["changed_signatures"] == []
    assert installation["hands_over"] == [hook["target"] for hook in installation["hooks"] if not hook["constant"]]
    for before, after in installation["constants"].values():
        assert after == sorted([*before, "sirius"])


def test_acceptance_rule_is_ours_only_inside_its_context(installation):
    assert installation["rule_inside"] == ["ours", [1], {"top": 2}]
    assert installation["rule_outside"].startswith("TypeError: rejection_sample() missing")
    assert installation["rule_names"] == installation["upstream_names"]


def test_entry_point_is_in_the_packages_metadata():
    found = [point for point in metadata.entry_points(group="vllm.general_plugins") if point.name == "sirius"]
    assert {point.value for point in found} == {"vllm_sirius.plugin:register"}


def test_speculative_config_is_ours_for_sirius_alone(behaviour):
    assert behaviour["classes"] == {
        "none": "NoneType",
        "ngram": "SpeculativeConfig",
        "sirius": "SiriusSpeculativeConfig",
    }


def test_worker_is_chosen_and_setups_are_judged_for_sirius_alone(behaviour):
    workers = behaviour["workers"]
    assert workers["sirius"] == "vllm_sirius.integration.cpu_worker.SiriusCPUWorker"
    assert workers["ngram"] == workers["none"] == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert "pipeline_parallel_size=2" in behaviour["refusal"]
    assert behaviour["same_without"] is None


def test_bad_options_are_refused_by_name_and_value(behaviour):
    words = [["density=2", "(0, 1]"], ["method='ngram'", "drop 'method'"], ["--spec-tokens=4", "mutually exclusive"]]
    for error, expected in zip(behaviour["bad_options"], words, strict=True):
        assert all(word in error for word in expected), error


def test_every_door_leads_to_the_same_config(behaviour):
    assert len(set(behaviour["doors"])) == 1
    assert "kernel_size=8" in behaviour["doors"][0]


def test_parser_gains_names_and_no_defaults(behaviour):
    assert behaviour["parsed"] == [
        [None, None, None],
        ["sirius", None, None],
        [None, "sirius", 7],
        [None, "a/draft", 3],
    ]


def test_lookahead_slots_are_reserved_for_sirius_alone(behaviour):
    assert behaviour["lookahead"] == {"none": 0, "ngram": 0, "sirius": 15}


def test_async_scheduling_stays_possible(behaviour):
    assert behaviour["async"] == {"none": [True, True], "ngram": [False, False], "sirius": [True, True]}


def test_speculator_is_ours_for_sirius_alone(copy_or_none):
    found = ask(probe_speculator, model_path(SMOL), patched_copy=copy_or_none)
    assert found == {"sirius": ["SiriusSpeculator", 2], "ngram": ["NgramGPUSpeculator", 3]}


def test_request_options_are_judged_for_sirius_alone(behaviour):
    errors = behaviour["request_errors"]
    assert errors["none"] is None
    assert errors["ngram"] is None
    assert "sirius_threshold='high'" in errors["sirius"]


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("version", ["supports vLLM 9.9.9", "Compatibility and limits", "SIRIUS_ALLOW_UNTESTED"]),
        ("fingerprint", ["spec_decode:init_speculator is not the one", "Compatibility and limits"]),
    ],
)
def test_where_nothing_fits_nothing_is_installed_and_the_reason_waits_for_sirius(cause, words):
    found = ask(probe_refusal, model_path(SMOL), cause)
    assert found["replaced"] == ["create_speculative_config"], "only the wrapper that explains"
    if cause == "version":
        assert found["loaded"] == []
    assert found["without"] is None
    assert found["ngram"] is None
    for error in found["sirius"]:
        assert error.startswith("SiriusIntegrationError: the speculative method 'sirius' is not available:")
        for word in words:
            assert word in error


def test_another_version_can_be_tried_at_ones_own_risk():
    found = ask(probe_refusal, model_path(SMOL), "version", environment={"SIRIUS_ALLOW_UNTESTED": "1"})
    assert found["reason"] is None
    assert found["replaced"] == ["create_speculative_config", "create_engine_config", "add_cli_args"]
    assert found["sirius"] == [None, None]


def test_plugin_left_out_by_vllm_plugins_is_not_loaded():
    found = ask(probe_absence, model_path(SMOL), environment={"VLLM_PLUGINS": "another"})
    assert found["loaded"] == []
    assert found["error"] is not None
