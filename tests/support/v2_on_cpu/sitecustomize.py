"""Lets Model Runner V2 run without a GPU: vLLM's Triton kernels go through Triton's interpreter.

vLLM uses Triton only where a backend with an active driver is registered, and looks when it is first imported; Python
imports a module of this name before anything else, in every process whose PYTHONPATH has this folder.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import triton.backends
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder


class _Driver:
    @staticmethod
    def is_active():
        return True


class _Backend:
    driver = _Driver


def _masked_store(self, ptrs, value, mask, *policies, **named):
    # The interpreter's mask of an integer expression, as in vLLM's grammar kernel, is no boolean array. What
    # follows the mask differs between Triton's releases.
    mask = TensorHandle(mask.data.astype(bool), mask.dtype)
    return _upstream_masked_store(self, ptrs, value, mask, *policies, **named)


_upstream_masked_store = InterpreterBuilder.create_masked_store
InterpreterBuilder.create_masked_store = _masked_store

triton.backends.backends["cpu"] = _Backend

# Saves a third of the interpreter's time: it would check every sum and product of vLLM's kernels for overflow.
object.__setattr__(interpreter_builder.options, "sanitize_overflow", False)
