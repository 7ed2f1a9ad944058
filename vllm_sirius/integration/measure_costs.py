"""Measures at start-up what a draft step and a target pass cost. Drives ``vllm.forward_context``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger

from vllm_sirius.config import SiriusConfig
from vllm_sirius.drafting.costs import StepCosts
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.device_clock import seconds_of
from vllm_sirius.integration.draft_model import DraftModel
from vllm_sirius.metrics import predicted_speedup

logger = init_logger("vllm.sirius")

TARGET_TOKENS = (1, 2, 4, 8, 16, 32, 64)
DRAFT_ROWS = (1, 2, 4, 5, 8, 9, 16, 17, 32)
"""Kernels take tokens in blocks, so that the first token beyond a power of two costs more than those after it."""

REPEATS = 2
"""Runs that are timed, of which the fastest counts, after one that is not."""


@torch.inference_mode()
def measure_costs(model: nn.Module, draft: DraftModel, vllm_config: Any, device: torch.device) -> StepCosts:
    """Times passes without KV pages; what attention, sampling and scheduling add is learnt while the engine runs.

    Args:
        model: The target.
        draft: The draft.
        vllm_config: The engine's config.
        device: Where the model runs.

    Returns:
        The costs.
    """
    target: Any = model

    def target_pass(token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        with set_forward_context(None, vllm_config, num_tokens=token_ids.shape[0]):
            hidden_states = target(
                input_ids=token_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None
            )
        target.compute_logits(hidden_states).argmax(dim=-1)

    def draft_step(token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        draft.compute_logits(draft.forward(token_ids, positions, None)).max(dim=-1)

    scheduler = vllm_config.scheduler_config
    config = vllm_config.speculative_config.sirius
    most_rows = scheduler.max_num_seqs
    most_tokens = min(most_rows * config.kernel_size, scheduler.max_num_batched_tokens)
    most_fed = most_rows * (1 + config.lookup_tokens)
    return StepCosts(
        draft={rows: _seconds(draft_step, rows, device) for rows in DRAFT_ROWS if rows <= most_fed},
        target={tokens: _seconds(target_pass, tokens, device) for tokens in TARGET_TOKENS if tokens <= most_tokens},
    )


def costs_of_worker(worker: Any) -> dict[str, dict[str, float]]:
    """What passes cost in an engine, on either model runner: `LLM.collective_rpc` takes this function.

    Args:
        worker: Upstream's worker or Sirius's.

    Returns:
        ``draft_seconds`` by rows and ``target_seconds`` by tokens.

    Raises:
        SiriusUnsupportedError: If the engine runs without Sirius.
    """
    runner = worker.model_runner
    # Model Runner V2 has its drafts in a speculator, V1 in the runner itself.
    source = getattr(runner, "speculator", None) or runner
    if not hasattr(source, "measure_costs"):
        raise SiriusUnsupportedError("the engine runs without Sirius, whose costs were asked for")
    costs: dict[str, dict[str, float]] = source.measure_costs().as_dict()
    return costs


def announce(costs: StepCosts, config: SiriusConfig) -> None:
    """Says what was measured, and warns where no acceptance could make adaptive drafts pay.

    Args:
        costs: The costs.
        config: The knobs.
    """
    alone = costs.target.seconds(1)
    draft_cost = costs.draft.seconds(1) / alone
    verify_cost = costs.target.seconds(config.kernel_size) / alone
    ceiling = max(
        predicted_speedup(length, length - 1, draft_cost, costs.target.seconds(length) / alone)
        for length in range(2, config.kernel_size + 1)
    )
    logger.info(
        "Sirius: measured draft cost %.2f of a target step (%.1f ms); correcting %d tokens costs %.2f steps | speed-up of one "
        "request at most %.2fx%s",
        draft_cost,
        1000 * alone,
        config.kernel_size,
        verify_cost,
        ceiling,
        ", more where guesses are right" if config.lookup_tokens else "",
    )
    # With a fixed length the engine drafts all the same.
    if ceiling < 1.0 and config.adaptive:
        logger.warning(
            "Sirius will not draft for single requests: with these knobs it could only slow them down on this machine. "
            "Use draft_weights='int8' or a lower density, or serve without it; `vllm-sirius tune` finds the best knobs."
        )


def _seconds(run: Callable[[torch.Tensor, torch.Tensor], None], size: int, device: torch.device) -> float:
    token_ids = torch.zeros(size, dtype=torch.int32, device=device)
    positions = torch.arange(size, dtype=torch.int64, device=device)
    run(token_ids, positions)
    return min(seconds_of(lambda: run(token_ids, positions), device) for _ in range(REPEATS))
