"""The acceptance rule of Model Runner V1. Attaches to ``vllm.v1.sample.rejection_sampler``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.integration.hook_engine import Hook, is_installed

AcceptanceRule = Callable[..., torch.Tensor]
"""Takes the arguments of upstream's `rejection_sample` and returns its result, ``int32 [B, max_spec_len + 1]``."""

_rule: ContextVar[AcceptanceRule | None] = ContextVar("sirius_acceptance_rule", default=None)


@contextmanager
def acceptance_rule(rule: AcceptanceRule) -> Iterator[None]:
    """Rejection sampling inside uses `rule` instead of upstream's."""
    token = _rule.set(rule)
    try:
        yield
    finally:
        _rule.reset(token)


def _rejection_sample(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        rule = _rule.get()
        return original(*args, **kwargs) if rule is None else rule(*args, **kwargs)

    return wrapper


def _expand_batch_to_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        if _rule.get() is None:
            expanded: torch.Tensor = original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
            return expanded
        ends = cu_num_tokens.long()
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts)

    return wrapper


def assert_rule_is_in_force() -> None:
    """Refuses to run where upstream's rule would judge, or where a request's temperature would not reach its drafts.

    Raises:
        SiriusIntegrationError: If neither the hooks nor the source patches are in force.
    """
    from vllm.v1.sample import rejection_sampler

    if not hasattr(rejection_sampler.RejectionSampler, "rejection_sample") and not is_installed(HOOKS[1]):
        raise SiriusIntegrationError(f"the acceptance rule of Sirius would not be asked; {_INCOMPLETE}")
    with acceptance_rule(rejection_sampler.rejection_sample):
        expanded = rejection_sampler.expand_batch_to_tokens(
            torch.tensor([0.5, 2.0]), torch.tensor([1, 3], dtype=torch.int32), 3
        )
    if expanded.tolist() != [0.5, 2.0, 2.0]:
        raise SiriusIntegrationError(f"drafted tokens would be sampled at undefined temperatures; {_INCOMPLETE}")


_INCOMPLETE = "this vLLM has only some of the patches in patches/: apply the whole series."

HOOKS = (
    Hook(
        target="vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        make=_expand_batch_to_tokens,
        fingerprint="ef896c2fe058",
        why="Without Triton its kernel writes into a copy that is thrown away, so each drafted position gets an undefined "
        "temperature, top-k and top-p.",
        untouched="no acceptance rule is set, which only Sirius's own sampler does, for the time of its call",
        remove_when="upstream's CPU build runs its own kernel for it",
    ),
    Hook(
        target="vllm.v1.sample.rejection_sampler:rejection_sample",
        make=_rejection_sample,
        fingerprint="dd7297cb744d",
        why="`RejectionSampler.forward` prepares the processed logits, which the acceptance rule judges, and then calls this "
        "function by its global name; a subclass cannot replace the rule without copying the whole method.",
        untouched="no acceptance rule is set, which only Sirius's own sampler does, for the time of its call",
        remove_when="upstream turns the rule into a method of RejectionSampler",
    ),
)
