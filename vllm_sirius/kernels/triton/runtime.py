"""The one place that imports Triton.

Modules with Triton kernels take `jit` and `tl` from here, so that they can be imported on a machine without Triton or
without a GPU; only calling a kernel there is an error, raised by `require_triton`.

`TRITON_INTERPRET=1`, set before the first import, runs kernels on CPU tensors in Triton's interpreter: slow, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

__all__ = ["INTERPRETED", "TritonUnavailableError", "jit", "require_triton", "tl", "triton"]

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None


class TritonUnavailableError(RuntimeError):
    """A Triton kernel was called where it cannot run."""


def _is_interpreted() -> bool:
    return triton is not None and bool(triton.knobs.runtime.interpret)


INTERPRETED: Any = _is_interpreted() if triton is None else tl.constexpr(_is_interpreted())
"""Whether kernels run in Triton's interpreter; a constant that kernels may read."""


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, or where Triton is missing a decorator that leaves the function alone.

    Args:
        function: The kernel, when used without options.
        **options: Options of `triton.jit`.
    """
    if function is None:
        return lambda kernel: jit(kernel, **options)
    return function if triton is None else triton.jit(function, **options)


def require_triton(tensor: torch.Tensor) -> None:
    """Checks that kernels can run on a tensor.

    Args:
        tensor: Any operand of the kernel.

    Raises:
        TritonUnavailableError: If Triton is missing, or if the tensor is on CPU and kernels are compiled.
    """
    if triton is None:
        raise TritonUnavailableError("Triton is not installed: install the CUDA build of vLLM, which brings it.")
    if not tensor.is_cuda and not _is_interpreted():
        raise TritonUnavailableError(
            f"Triton kernels need tensors on a GPU, not on {tensor.device}; for tests on CPU set TRITON_INTERPRET=1 "
            "before Python starts."
        )
