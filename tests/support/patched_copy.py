"""What shows that an engine runs on a patched copy of vLLM. Runs in the child of `engine_host`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def describe_attachment(llm: Any) -> dict[str, Any]:
    """Where the modules of this process come from, and how Sirius got into it."""
    import vllm

    from support.probes import loaded_hooks, model_runner
    from vllm_sirius.integration import native

    return {
        "package": str(Path(vllm.__file__).parent),
        "runner_module": type(model_runner(llm)).__mro__[1].__module__,
        "modules": sorted(_foreign_modules(Path(vllm.__file__).parent)),
        "hooks": loaded_hooks(llm),
        "registered": native.is_registered(),
    }


def _foreign_modules(package: Path) -> set[str]:
    """Modules of vLLM that were read from outside a folder."""
    import sys

    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return {
        name
        for name, file in files.items()
        if name.split(".")[0] == "vllm" and file is not None and not Path(file).is_relative_to(package)
    }
