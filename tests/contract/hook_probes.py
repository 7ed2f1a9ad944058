"""What `test_hooks` asks of vLLM with and without the hooks. Runs in processes that have imported vLLM."""

from __future__ import annotations

import inspect
import sys
from typing import get_args

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


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
