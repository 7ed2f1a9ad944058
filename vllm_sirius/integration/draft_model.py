"""The draft as a callable model, for both runners: a compiled clone of the target where that works, else the target itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger

from vllm_sirius.draft.layer import ReducedFFNs
from vllm_sirius.draft.self_test import NUM_TOKENS
from vllm_sirius.integration.compiled_draft import can_compile, clone_draft, release_with
from vllm_sirius.integration.draft_norms import switch_norms

logger = init_logger("vllm.sirius")


class DraftModel:
    """One token per row through the reduced target.

    Args:
        model: The target, with the switch installed.
        ffns: The switch.
        vllm_config: The engine's config.
        predicted_cost: Part of a target step's bytes that a draft step reads; 1 where drafts are masked.

    Attributes:
        predicted_cost: See the argument.
        compiled: Whether a compiled clone drafts. Otherwise the target's modules run uncompiled, in draft mode, because a
            compiled graph would have frozen the mode.
    """

    def __init__(self, model: nn.Module, ffns: ReducedFFNs, vllm_config: Any, predicted_cost: float) -> None:
        self.predicted_cost = predicted_cost
        self._ffns = ffns
        self._target: Any = model
        self._vllm_config = vllm_config
        self.compiled = can_compile(model, ffns, vllm_config)
        self._model = clone_draft(model, ffns, vllm_config) if self.compiled else model
        if self.compiled:
            release_with(self, self._model)
        else:
            switch_norms(model, ffns)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attn_metadata: Any, **context: Any
    ) -> torch.Tensor:
        """Runs the draft.

        Args:
            input_ids: ``int32 [num_tokens]``.
            positions: ``int64 [num_tokens]``.
            attn_metadata: Attention metadata by layer, or ``None`` for a trial run without KV pages.
            **context: More of upstream's `set_forward_context`.

        Returns:
            Hidden states, ``[num_tokens, hidden_size]``.
        """
        num_tokens = input_ids.shape[0]
        self._ffns.switch.begin(num_tokens)
        with (
            set_forward_context(
                attn_metadata, self._vllm_config, num_tokens=num_tokens, skip_compiled=not self.compiled, **context
            ),
            self._ffns.draft_mode(),
        ):
            hidden_states: torch.Tensor = self._model(
                input_ids=input_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None
            )
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of the draft, ``[rows, vocabulary]``, by the lm_head that drafts use. Ends the step that `forward` began.

        Args:
            hidden_states: ``[rows, hidden_size]``.
        """
        with self._ffns.draft_mode():
            logits: torch.Tensor = self._target.compute_logits(hidden_states)
        self._ffns.switch.end()
        return logits

    def steady(self) -> AbstractContextManager[None]:
        """Draft steps inside run the usual way, and nothing is learnt from how long they take."""
        return self._ffns.switch.held()

    @torch.inference_mode()
    def try_out(self, device: torch.device) -> None:
        """Runs a few tokens without KV pages, which leaves attention's output undefined; compiles the clone.

        Args:
            device: Where the model lives.
        """
        if self.compiled:
            logger.info("Sirius: compiles the draft, a clone of the model; this can take minutes")
        started = time.perf_counter()
        self.compute_logits(self.forward(*_few_tokens(device), None))
        if self.compiled:
            logger.info("Sirius: compiled the draft in %.1f s", time.perf_counter() - started)

    @torch.inference_mode()
    def never_called(self, layers: Sequence[nn.Module], device: torch.device) -> set[nn.Module]:
        """Those of some layers of the model that a pass of its own modules, uncompiled, does not call.

        Args:
            layers: The layers. One that is no longer part of the model is not among the answer: another stands in its place.
            device: Where the model lives.
        """
        called: set[nn.Module] = set()
        hooks = [layer.register_forward_pre_hook(lambda module, _: called.add(module)) for layer in layers]
        token_ids, positions = _few_tokens(device)
        context = set_forward_context(None, self._vllm_config, num_tokens=NUM_TOKENS, skip_compiled=True)
        try:
            with context, self._ffns.draft_mode():
                self._target(input_ids=token_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
        finally:
            for hook in hooks:
                hook.remove()
        inside = set(self._target.modules())
        return {layer for layer in layers if layer in inside and layer not in called}


def _few_tokens(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions of a trial run."""
    token_ids = torch.zeros(NUM_TOKENS, dtype=torch.int32, device=device)
    return token_ids, torch.arange(NUM_TOKENS, dtype=torch.int64, device=device)
