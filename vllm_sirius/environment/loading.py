"""As a program: loads vLLM and Sirius as an engine would, and says which. Ends in an error where that fails."""

from __future__ import annotations

import sys
from importlib import import_module, metadata

from vllm_sirius import plugin
from vllm_sirius.errors import SiriusError


def main() -> int:
    """Loads both.

    Returns:
        0; 1 if Sirius cannot be attached.

    Raises:
        SiriusError: If vLLM would not find the plugin.
    """
    torch, vllm = import_module("torch"), import_module("vllm")
    points = list(metadata.entry_points(group="vllm.general_plugins", name="sirius"))
    if not points:
        raise SiriusError("vLLM does not see the entry point of vllm-sirius: install the package again")
    for point in points:
        point.load()()
    if (reason := plugin.unavailable_reason()) is not None:
        raise SiriusError(reason)
    sys.stdout.write(f"\ntorch {torch.__version__}, vLLM {vllm.__version__}, plugin {points[0].value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
