"""Sirius for vLLM: contextual sparsity with correction as a speculative method that needs no draft model."""

from vllm_sirius.version import __version__

__all__ = ["__version__"]
