"""The hooks fit the installed vLLM, the ledger says what they are, and nobody else notices them.

vLLM is imported in other processes only: `ask` runs one of this file's `probe_*` functions there and returns what it found.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from importlib import metadata
from typing import get_args

import pytest
from support.engine_host import Child, runner_environment
from support.real_models import ROOT, SMOL, model_path

LEDGER = ROOT / "patches" / "README.md"
FIELDS = ["Process", "Fingerprint", "Why", "Delta", "Untouched", "Test", "Upstream", "Patch", "Remove when"]
PROCESSES = {
    "every": "every process that loads the plugin",
    "worker": "worker of an engine with Sirius on Model Runner V1",
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


def ask(probe, *arguments, environment=None, patched_copy=None):
    """Runs a probe of a test file in a process of its own, on the installed vLLM or on the copy in a folder.

    vLLM is imported there and nothing of the plugin's, as in a program that begins with ``from vllm import LLM``.
    """
    server = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
    server |= {"PYTHONPATH": runner_environment("v1")["PYTHONPATH"], "VLLM_LOGGING_LEVEL": "ERROR"}
    if patched_copy is not None:
        server["PYTHONPATH"] = os.pathsep.join([str(patched_copy), server["PYTHONPATH"]])
    variables = {**server, **(environment or {})}
    with Child(variables, server={**server, "PYTHONPATH": variables["PYTHONPATH"]}) as child:
        return child.call(f"{inspect.getfile(probe)}:{probe.__name__}", *arguments)


def is_constant(stored):
    return not callable(plain(stored)) or hasattr(stored, "__args__")


def plain(stored):
    """The function behind a property or static method."""
    if isinstance(stored, property):
        return stored.fget
    return getattr(stored, "__func__", stored)


def accepts_the_calls_of(original, wrapper):
    """Whether a wrapper names the original's parameters, as far as it names any."""
    found = list(inspect.signature(wrapper, follow_wrapped=False).parameters.values())
    named = [parameter.name for parameter in found if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    known = list(inspect.signature(original, follow_wrapped=False).parameters)
    return named == known[: len(named)] and (len(named) == len(known) or len(found) == len(named) + 2)


def error_of(function, *arguments, **options):
    """Type and text of the exception that a call raises; ``None`` if there is none."""
    try:
        function(*arguments, **options)
    except Exception as error:  # noqa: BLE001 - whatever vLLM or the plugin raises is what is asked for
        return f"{type(error).__name__}: {error}"
    return None


def probe_installation(relied_on):
    from vllm.plugins import load_general_plugins

    from vllm_sirius import plugin
    from vllm_sirius.integration.hook_engine import install, is_installed, resolve, source_fingerprint
    from vllm_sirius.integration.installed_hooks import HOOKS, worker_hooks

    hooks = (*HOOKS, *worker_hooks())
    before = {hook.target: plain(resolve(hook.target)[2]) for hook in hooks}
    report = {
        "hooks": [
            {
                "target": hook.target,
                "process": "every" if hook in HOOKS else "worker",
                "pinned": hook.fingerprint,
                "found": source_fingerprint(resolve(hook.target)[2]),
                "why": hook.why,
                "untouched": hook.untouched,
                "remove_when": hook.remove_when,
                "constant": is_constant(before[hook.target]),
                "upstream_code": getattr(getattr(before[hook.target], "__code__", None), "co_filename", None),
            }
            for hook in hooks
        ],
        "relied_on": {target: source_fingerprint(resolve(target)[2]) for target in relied_on},
        "installed_before": [hook.target for hook in hooks if is_installed(hook)],
    }
    load_general_plugins()
    report["reason"] = plugin.unavailable_reason()
    report["installed"] = [hook.target for hook in hooks if is_installed(hook)]
    after = {hook.target: plain(resolve(hook.target)[2]) for hook in HOOKS}
    plugin.register()
    plugin._registered = False
    plugin.register()
    report["wrapped_once"] = [target for target in after if plain(resolve(target)[2]) is after[target]]
    install(worker_hooks())
    functions = {target: function for target, function in before.items() if not is_constant(function)}
    report["changed_signatures"] = [
        target for target in functions if not accepts_the_calls_of(before[target], plain(resolve(target)[2]))
    ]
    report["hands_over"] = [target for target in functions if plain(resolve(target)[2]).__wrapped__ is before[target]]
    report["constants"] = {
        target: [sorted(get_args(before[target])), sorted(get_args(resolve(target)[2]))]
        for target in before
        if target not in functions
    }
    report |= probe_rejection_sample()
    return report


def probe_rejection_sample():
    from vllm.v1.sample import rejection_sampler

    from vllm_sirius.integration.runner_v1.rejection_sample import acceptance_rule
    from vllm_sirius.integration.runner_v1.rejection_sampler import SiriusRejectionSampler

    with acceptance_rule(lambda *arguments, **options: ["ours", arguments, options]):
        inside = rejection_sampler.rejection_sample(1, top=2)
    rule = inspect.signature(SiriusRejectionSampler.rejection_sample).parameters
    upstream = inspect.signature(rejection_sampler.rejection_sample).parameters
    named = [p.name for p in rule.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    return {
        "rule_inside": inside,
        "rule_outside": error_of(rejection_sampler.rejection_sample),
        "rule_names": named,
        "upstream_names": list(upstream)[: len(named)],
    }


def probe_speculator(model):
    """Which speculator Model Runner V2 would build; its modules need Triton, so the classes are stand-ins."""
    from types import ModuleType, SimpleNamespace

    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.v1.worker.gpu import spec_decode

    for name, built in (
        ("vllm_sirius.integration.runner_v2.speculator", "SiriusSpeculator"),
        ("vllm.v1.worker.gpu.spec_decode.ngram.speculator", "NgramGPUSpeculator"),
    ):
        sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], built, lambda *arguments, built=built: [built, len(arguments)])
    sirius = EngineArgs(model=model, max_model_len=128, speculative_config={"method": "sirius"}).create_engine_config()
    ngram = SimpleNamespace(
        method="ngram_gpu",
        use_ngram=lambda: True,
        **{name: lambda: False for name in ("use_gemma4_mtp", "use_multi_module_mtp", "use_eagle", "uses_draft_model")},
    )
    return {
        "sirius": spec_decode.init_speculator(sirius, "cpu", None),
        "ngram": spec_decode.init_speculator(SimpleNamespace(speculative_config=ngram), "cpu", None),
    }


def probe_behaviour(model):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def create(**options):
        return EngineArgs(model=model, max_model_len=128, **options).create_engine_config()

    def parse(*flags):
        given = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(list(flags))
        return [given.spec_method, given.spec_model, given.spec_tokens]

    def async_scheduling(**options):
        """What vLLM decides by itself and for a user who asks for it, before the CPU platform switches it off."""
        decided = []
        update = current_platform.check_and_update_config

        def note_and_update(config):
            decided.append(config.scheduler_config.async_scheduling)
            update(config)

        current_platform.check_and_update_config = note_and_update
        try:
            create(**options)
            asked = error_of(create, async_scheduling=True, **options)
        finally:
            del current_platform.check_and_update_config
        return [decided[0], asked is None]

    configs = {
        "none": create(),
        "ngram": create(speculative_config=dict(NGRAM)),
        "sirius": create(speculative_config={"method": "sirius"}),
    }
    bad = SamplingParams(extra_args={"sirius_threshold": "high", "other": 1})
    return {
        "classes": {name: type(config.speculative_config).__name__ for name, config in configs.items()},
        "workers": {name: config.parallel_config.worker_cls for name, config in configs.items()},
        "lookahead": {name: config.num_lookahead_tokens for name, config in configs.items()},
        "async": {
            "none": async_scheduling(),
            "ngram": async_scheduling(speculative_config=dict(NGRAM)),
            "sirius": async_scheduling(speculative_config={"method": "sirius"}),
        },
        "refusal": error_of(create, speculative_config={"method": "sirius"}, pipeline_parallel_size=2),
        "bad_options": [
            error_of(create, speculative_config={"method": "sirius", "density": 2}),
            error_of(create, speculative_config={"model": "sirius", "method": "ngram"}),
            error_of(create, speculative_config={"method": "sirius", "num_speculative_tokens": 3}, spec_tokens=4),
        ],
        "doors": [
            repr(create(**door).speculative_config)
            for door in (
                {"spec_method": "sirius", "spec_tokens": 7},
                {"spec_model": "sirius", "speculative_config": {"kernel-size": 8}},
                {"speculative_config": {"model": "sirius", "num_speculative_tokens": 7}},
            )
        ],
        "same_without": error_of(create, pipeline_parallel_size=2),
        "parsed": [
            parse(),
            parse("--spec-method", "sirius"),
            parse("--speculative-model", "sirius", "--num-speculative-tokens", "7"),
            parse("--spec-model", "a/draft", "--spec-tokens", "3"),
        ],
        "request_errors": {
            name: error_of(
                bad.verify, config.model_config, config.speculative_config, config.structured_outputs_config, None
            )
            for name, config in configs.items()
        },
    }


def probe_refusal(model, cause):
    """What happens where the plugin does not fit: another version of vLLM, or a hooked symbol that has changed."""
    from dataclasses import replace

    from vllm.engine.arg_utils import EngineArgs

    from vllm_sirius import plugin

    watched = ("create_speculative_config", "create_engine_config", "add_cli_args")
    before = {name: inspect.getattr_static(EngineArgs, name) for name in watched}
    if cause == "version":
        plugin.TARGET_VLLM_VERSION = "9.9.9"
    else:
        from vllm_sirius.integration import installed_hooks

        *rest, last = installed_hooks.HOOKS
        installed_hooks.HOOKS = (*rest, replace(last, fingerprint="0" * 12))
    plain_args = EngineArgs(model=model, max_model_len=128)
    return {
        "reason": plugin.unavailable_reason(),
        "replaced": [name for name in watched if inspect.getattr_static(EngineArgs, name) is not before[name]],
        "loaded": sorted(name for name in sys.modules if name.startswith("vllm_sirius.integration.")),
        "without": error_of(plain_args.create_engine_config),
        "ngram": error_of(
            EngineArgs(model=model, max_model_len=128, speculative_config=dict(NGRAM)).create_engine_config
        ),
        "sirius": [
            error_of(EngineArgs(model=model, max_model_len=128, **options).create_engine_config)
            for options in ({"speculative_config": {"method": "sirius"}}, {"spec_model": "sirius"})
        ],
    }


def probe_absence(model):
    """VLLM_PLUGINS leaves the plugin out."""
    from vllm.engine.arg_utils import EngineArgs

    error = error_of(
        EngineArgs(model=model, max_model_len=128, speculative_config={"method": "sirius"}).create_engine_config
    )
    return {"error": error, "loaded": sorted(name for name in sys.modules if name.startswith("vllm_sirius"))}


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
