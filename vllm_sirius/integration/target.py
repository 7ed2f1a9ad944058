"""The target as both model runners see it once it is loaded, and the switch between target and draft put into it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger

from vllm_sirius.config import SiriusConfig
from vllm_sirius.draft.backends import Backend
from vllm_sirius.draft.kernel_switch import KernelSwitch
from vllm_sirius.draft.layer import ReducedFFNs
from vllm_sirius.draft.locate import GatedFFN
from vllm_sirius.draft.low_bit_linears import LowBitLinears
from vllm_sirius.draft.self_test import assert_draft_is_reduced, backend_reproduces_ffns
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.draft_model import DraftModel
from vllm_sirius.integration.draft_plan import DraftPlan
from vllm_sirius.integration.graph_operators import register_switch
from vllm_sirius.integration.reload import TargetReload
from vllm_sirius.integration.speculative_config import ResolvedDraft, resolved_config, settle
from vllm_sirius.offload.plan import MemoryPlan
from vllm_sirius.sparsity.coarse import CoarseSelection
from vllm_sirius.sparsity.selector import NeuronSelector
from vllm_sirius.sparsity.statistics import REFRESH_DECAY, NeuronStatistics, ObserveKernel
from vllm_sirius.target.streamed import StreamedTarget

logger = init_logger("vllm.sirius")

MAX_PENDING_ROWS = 512
"""Rows of verification passes whose activations wait for acceptance; bounds the memory at large batches."""


@dataclass(frozen=True)
class LoadedTarget:
    """The target and its FFNs.

    Attributes:
        model: The loaded model.
        plan: Its parts, and what drafts read of them.
        neuron_norms: ``||down_j||**2`` of every neuron of every layer, one after the other, ``float32``.
        backend: Kernels bound to the weights, or ``None`` where no native kernel can be used.
        reload: Makes what was derived from the weights again when they change.
        linears: Further layers that drafts run on quantised copies.
        observe: Kernel that feeds the statistics inside captured graphs, or ``None`` where there are none.
    """

    model: nn.Module
    plan: DraftPlan
    neuron_norms: torch.Tensor
    backend: Backend | None
    reload: TargetReload
    observe: ObserveKernel | None = None
    linears: LowBitLinears | None = None
    streamed: StreamedTarget | None = None
    memory: MemoryPlan | None = None

    @property
    def ffns(self) -> list[GatedFFN]:
        """Its gated FFNs."""
        return self.plan.ffns

    @property
    def streamed_groups(self) -> tuple[int, ...]:
        """Groups of its layers that are read from a disk."""
        return () if self.memory is None else tuple(self.memory.streamed)


def settle_target(target: LoadedTarget, vllm_config: Any) -> LoadedTarget:
    """Decides for good what a freshly loaded target's drafts run on, and writes it into the engine's config.

    Args:
        target: The target, without the switch.
        vllm_config: The engine's config.

    Returns:
        The target, without kernels if its FFNs compute more than these do.

    Raises:
        SiriusUnsupportedError: If the options given need the kernels.
    """
    target = _with_true_kernels(target, vllm_config)
    settle(vllm_config, ResolvedDraft(target.plan.config, target.backend is not None, target.streamed_groups))
    return target


def _with_true_kernels(target: LoadedTarget, vllm_config: Any) -> LoadedTarget:
    given: SiriusConfig = vllm_config.speculative_config.sirius
    config, device = target.plan.config, target.neuron_norms.device
    if target.backend is None or backend_reproduces_ffns(
        target.ffns, target.backend, vllm_config.model_config.dtype, device
    ):
        return target
    chosen = given.draft_weights == "auto" and given.sparsity != "none"
    if config.draft_bits is not None and not chosen:
        raise SiriusUnsupportedError(
            f"draft_weights={config.draft_weights!r}: the FFNs of this model compute more than gate, up and down, which the "
            "kernels do not know: use draft_weights='shared'."
        )
    target.reload.drop_copies()
    plan = target.plan.masked(given, "the model's FFNs compute more than gate, up and down")
    return replace(target, plan=plan, backend=None, linears=None)


def install_switch(target: LoadedTarget, vllm_config: Any) -> tuple[ReducedFFNs, NeuronSelector | None]:
    """Puts the switch between target and draft into a freshly loaded target.

    Args:
        target: The target.
        vllm_config: The engine's config.

    Returns:
        The switch, and what chooses the neurons with coarse sparsity.
    """
    config = resolved_config(vllm_config.speculative_config)
    sizes = [ffn.num_neurons for ffn in target.ffns]
    device = target.neuron_norms.device
    selection = statistics = selector = None
    if config.sparsity == "coarse":
        scheduler = vllm_config.scheduler_config
        pending = min(scheduler.max_num_seqs * config.kernel_size, MAX_PENDING_ROWS) if config.refresh else 0
        statistics = NeuronStatistics(
            sizes,
            scheduler.max_num_seqs,
            pending,
            device,
            REFRESH_DECAY if config.refresh else 1.0,
            scheduler.max_num_batched_tokens,
            target.observe,
        )
        selection = CoarseSelection(sizes, config.density, vllm_config.model_config.dtype, device)
        selector = NeuronSelector(statistics, selection, target.neuron_norms if config.refresh else None)
        selector.forget()
        target.reload.call_after(selector.forget)
    density = 1.0 if config.sparsity == "none" else config.density
    # With fixed lengths and without prompt lookup nothing hangs on time, so that outputs can be repeated.
    # Where the target's weights are on a disk, no draft may read them.
    learns = target.streamed is None and (
        target.backend is not None and device.type == "cpu" and (config.adaptive or config.prompt_lookup_tokens > 0)
    )
    switch = KernelSwitch(learns)
    ffns = ReducedFFNs(target.ffns, density, selection, statistics, target.backend, target.linears, switch)
    ffns.install()
    register_switch(vllm_config, ffns)
    return ffns, selector


def make_draft(target: LoadedTarget, ffns: ReducedFFNs, vllm_config: Any, device: torch.device) -> DraftModel:
    """Makes the draft, then the start-up self-test and the start-up line.

    Args:
        target: The target, with the switch installed.
        ffns: The switch.
        vllm_config: The engine's config.
        device: Where the model lives.

    Returns:
        The draft.

    Raises:
        SiriusIntegrationError: If the draft turns out not to be reduced.
    """
    config = resolved_config(vllm_config.speculative_config)
    dtype = vllm_config.model_config.dtype
    predicted_cost = target.plan.counted_density(ffns.backend, ffns.linears)
    if target.streamed_groups:
        predicted_cost = 0.0  # bytes from a disk and bytes from memory cannot be compared
    draft = DraftModel(target.model, ffns, vllm_config, predicted_cost)
    with set_current_vllm_config(vllm_config):
        difference = assert_draft_is_reduced(
            ffns, lambda: draft.try_out(device), dtype, device, lambda layers: draft.never_called(layers, device)
        )
    by_batch = vllm_config.speculative_config.adaptive_lengths is not None
    adaptive = by_batch if vllm_config.use_v2_model_runner else config.adaptive
    _announce(config, adaptive, target, ffns, difference)
    logger.info(
        "Sirius: the target's linear layers run on %s (%s)",
        "Sirius's kernel" if target.plan.target_kernels.panels else "vLLM's kernels",
        target.plan.target_kernels.reason,
    )
    return draft


def _announce(config: SiriusConfig, adaptive: bool, target: LoadedTarget, ffns: ReducedFFNs, difference: float) -> None:
    """Says at start-up what will run and what it costs, in one line; `adaptive` if draft lengths really adapt."""
    rule = "lossless" if config.lossless else f"threshold {config.threshold:g} (lossy)"
    refreshed = ", refreshed" if config.sparsity == "coarse" and config.refresh else ""
    what = "all neurons" if config.sparsity == "none" else f"{config.sparsity} density {config.density:g}{refreshed}"
    if config.draft_bits is not None:
        what += f", {config.draft_weights} {config.draft_weights_scope}"
    preset = "" if config.preset is None else f"preset {config.preset}, "
    plan, kernels = target.plan, target.plan.kernels
    kept = plan.counted_density(ffns.backend, ffns.linears)
    logger.info(
        "Sirius: %d gated FFNs of %d neurons, %s | %skernel size %d%s, %s | extra memory %.1f MiB | FFN is "
        "%.0f%% of a step's bytes, a draft step keeps %.0f%% of the bytes, predicted draft cost %.2f of a target step (%s) | "
        "self-test: draft differs from target by %.1f%%",
        len(plan.ffns),
        plan.num_neurons,
        what,
        preset,
        config.kernel_size,
        ", adaptive" if adaptive else "",
        rule,
        ffns.num_bytes / 2**20,
        100 * plan.ffn_share,
        100 * kept,
        kept,
        f"native kernels, {kernels.reason}" if kernels.native else f"masked dense FFN: {kernels.reason}",
        100 * difference,
    )
