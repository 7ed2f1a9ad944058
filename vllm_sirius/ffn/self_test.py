"""Proof, at start-up, that the draft really is a reduced target.

A switch without effect (a compiled graph that froze the mode, a module replaced after the switch was installed) would
draft with the dense target: correct, slow and silent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.ffn.backends import Backend
from vllm_sirius.ffn.layer import ReducedFFNs
from vllm_sirius.ffn.locate import GatedFFN

NUM_TOKENS = 4
REMEDY = (
    "another plugin may have replaced the model's modules; report this with the model's name and the engine's options."
)


def backend_reproduces_ffns(
    ffns: Sequence[GatedFFN], backend: Backend, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the kernels with all neurons give what the model's own FFNs give.

    They do not where an FFN computes more than that, for example multiplies its output.

    Args:
        ffns: The FFNs, as the model has them.
        backend: The kernels.
        dtype: The model's dtype.
        device: Where it lives.
    """
    for layer, ffn in enumerate(ffns):
        hidden_states = _random_hidden_states(ffn.hidden_size, dtype, device)
        dense = ffn.module(hidden_states).float()
        whole = backend.whole(layer, hidden_states).float()
        if not float((dense - whole).norm()) <= backend.max_error * float(dense.norm()):
            return False
    return True


def assert_draft_is_reduced(
    ffns: ReducedFFNs, draft_forward: Callable[[], object], dtype: torch.dtype, device: torch.device
) -> float:
    """Runs every FFN on random input in both modes, then the whole model in the way drafts run it.

    Args:
        ffns: The switch. With coarse sparsity a selection must have been made.
        draft_forward: One forward pass of the whole model as drafts run it.
        dtype: The model's dtype.
        device: Where it lives.

    Returns:
        Mean relative difference between the outputs of a reduced FFN and the dense one.

    Raises:
        SiriusIntegrationError: If an FFN gives the dense result although neurons are dropped, or is not run reduced in a
            draft pass of the whole model.
    """
    differences = []
    for layer, ffn in enumerate(ffns.ffns):
        hidden_states = _random_hidden_states(ffn.hidden_size, dtype, device)
        dense = ffn.module(hidden_states).float()
        with ffns.draft_mode():
            draft = ffn.module(hidden_states).float()
        difference = float((dense - draft).norm() / dense.norm().clamp_min(1e-9))
        if ffns.density < 1.0 and not difference > 0.0:
            raise SiriusIntegrationError(
                f"self-test: the FFN {ffns.ffns[layer].name!r} drafts with all its neurons: {REMEDY}"
            )
        differences.append(difference)
    calls = ffns.num_draft_calls
    draft_forward()
    reduced = ffns.num_draft_calls - calls
    if reduced != len(ffns.ffns):
        raise SiriusIntegrationError(
            f"self-test: a draft pass ran {reduced} of {len(ffns.ffns)} FFNs reduced: {REMEDY}"
        )
    return sum(differences) / len(differences)


def _random_hidden_states(hidden_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    hidden_states = torch.randn(NUM_TOKENS, hidden_size, generator=torch.Generator().manual_seed(0))
    return hidden_states.to(device, dtype)
