"""Another plugin was there first, or attaching fails in an unforeseen way: vLLM starts, and the reason waits for Sirius."""

import functools

from hook_probes import error_of
from support.real_models import SMOL, model_path
from test_hooks import ask


def probe_strangers(model):
    """What happens where another plugin was there first, or attaching fails in a way that nobody foresaw."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sirius import plugin
    from vllm_sirius.integration import native

    upstream, registry = EngineArgs.create_speculative_config, native._registry
    namespace = {"__name__": "stranger", "upstream": upstream}
    exec("def stranger(self, *args, **kwargs):\n    return upstream(self, *args, **kwargs)", namespace)
    without_source = namespace["stranger"]
    wraps = functools.wraps(upstream)(lambda self, *args, **kwargs: upstream(self, *args, **kwargs))
    Stranger = type("Stranger", (), {"__module__": "stranger", "__call__": lambda self, *args, **kwargs: None})  # noqa: N806
    found = {}
    for cause, hook in (("source", without_source), ("wraps", wraps), ("object", Stranger()), ("unforeseen", upstream)):
        EngineArgs.create_speculative_config = hook
        native._registry = (lambda: 1 // 0) if cause == "unforeseen" else registry
        plugin._registered = False
        odd = EngineArgs(model=model, max_model_len=128)
        plain, sirius = (
            EngineArgs(model=model, max_model_len=128, speculative_config=options)
            for options in (None, {"method": "sirius"})
        )
        plugin.register()
        odd.speculative_config = ["sirius"]
        found[cause] = {
            "without": error_of(plain.create_engine_config),
            "odd": error_of(odd.create_speculative_config, None, None),
            "sirius": error_of(sirius.create_engine_config),
        }
    return found


def test_whatever_keeps_sirius_out_keeps_no_engine_from_starting():
    found = ask(probe_strangers, model_path(SMOL))
    replaced = "create_speculative_config has been replaced by "
    words = {
        "source": replaced + "stranger of the module 'stranger' (<string>)",
        "wraps": replaced + "probe_strangers.<locals>.<lambda> of the module 'test_strangers'",
        "object": replaced + "an object of Stranger of the module 'stranger'",
        "unforeseen": "it could not be attached to vLLM (ZeroDivisionError: ",
    }
    assert list(found) == list(words)
    for cause, errors in found.items():
        assert errors["without"] is None
        assert "Sirius" not in (errors["odd"] or ""), "vLLM's own words, if any"
        assert errors["sirius"].startswith("SiriusIntegrationError: the speculative method 'sirius' is not available:")
        assert words[cause] in errors["sirius"]
