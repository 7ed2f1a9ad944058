"""Lets Model Runner V2 run without a GPU: vLLM's Triton kernels go through Triton's interpreter.

vLLM uses Triton only where a backend with an active driver is registered, and looks when it is first imported; Python
imports a module of this name before anything else, in every process whose PYTHONPATH has this folder.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import triton.backends
from triton.runtime.interpreter import interpreter_builder


class _Driver:
    @staticmethod
    def is_active():
        return True


class _Backend:
    driver = _Driver


triton.backends.backends["cpu"] = _Backend

# Halves the interpreter's time: it would check every sum and product of vLLM's kernels for overflow.
object.__setattr__(interpreter_builder.options, "sanitize_overflow", False)
