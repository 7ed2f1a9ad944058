"""Measures at start-up what a draft step and a target pass cost. Drives ``vllm.forward_context``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger

from vllm_sirius.config import SiriusConfig
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.device_clock import seconds_of
from vllm_sirius.integration.draft_model import DraftModel
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.pacing.start_costs import Pass, measure_by_turns, passes_to_measure, what_costs_promise

logger = init_logger("vllm.sirius")


@torch.inference_mode()
def measure_costs(model: nn.Module, draft: DraftModel, vllm_config: Any, device: torch.device) -> StepCosts:
    """Times passes by turns, without KV pages; what attention, sampling and scheduling add is learnt while the engine runs.

    Args:
        model: The target.
        draft: The draft.
        vllm_config: The engine's config.
        device: Where the model runs.

    Returns:
        The costs.

    Raises:
        SiriusUnsupportedError: If several ranks share the passes.
    """
    check_measurable(vllm_config)
    target: Any = model
    max_model_len: int = vllm_config.model_config.max_model_len

    def target_pass(token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        with set_forward_context(None, vllm_config, num_tokens=token_ids.shape[0]):
            hidden_states = target(
                input_ids=token_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None
            )
        target.compute_logits(hidden_states).argmax(dim=-1)

    def draft_step(token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        draft.compute_logits(draft.forward(token_ids, positions, None)).max(dim=-1)

    def seconds(one: Pass) -> float:
        token_ids = torch.zeros(one.size, dtype=torch.int32, device=device)
        positions = torch.tensor(one.positions(max_model_len), dtype=torch.int64, device=device)
        run = draft_step if one.draft else target_pass
        return seconds_of(lambda: run(token_ids, positions), device)

    scheduler, config = vllm_config.scheduler_config, vllm_config.speculative_config.sirius
    most_tokens = min(scheduler.max_num_seqs * config.kernel_size, scheduler.max_num_batched_tokens)
    passes = passes_to_measure(most_tokens, scheduler.max_num_seqs * (1 + config.prompt_lookup_tokens))
    if config.offload == "disk":
        # Each pass reads the weights from a disk, which takes the same time whatever its size.
        passes = [one for one in passes if one.draft or one.size in (1, most_tokens)]
    with draft.steady():
        return measure_by_turns(passes, seconds, draft.predicted_cost)


def check_measurable(vllm_config: Any) -> None:
    """Refuses to time passes that several ranks share: each decides by its own clock how many passes to run.

    Args:
        vllm_config: The engine's config.

    Raises:
        SiriusUnsupportedError: With the option, its value and the remedy.
    """
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1:
        raise SiriusUnsupportedError(
            f"costs cannot be measured with tensor_parallel_size={ranks}: each rank would decide by its own clock which "
            "passes to time, and wait for ever where another decides otherwise; measure with tensor_parallel_size=1"
        )


def costs_of_worker(worker: Any) -> dict[str, dict[str, float]]:
    """What passes cost in an engine, on either model runner: `LLM.collective_rpc` takes this function.

    Args:
        worker: Upstream's worker or Sirius's.

    Returns:
        ``draft_seconds`` by rows and ``target_seconds`` by tokens.

    Raises:
        SiriusUnsupportedError: If the engine runs without Sirius, or several ranks share the passes.
    """
    runner = worker.model_runner
    # Model Runner V2 has its drafts in a speculator, V1 in the runner itself.
    source = getattr(runner, "speculator", None) or runner
    if not hasattr(source, "measure_costs"):
        raise SiriusUnsupportedError("the engine runs without Sirius, whose costs were asked for")
    costs: dict[str, dict[str, float]] = source.measure_costs().as_dict()
    return costs


def announce(costs: StepCosts, config: SiriusConfig, predicted_cost: float, seconds: float) -> None:
    """Says what was measured, and warns where no acceptance could make adaptive drafts pay.

    Args:
        costs: The costs.
        config: The options, as they were resolved.
        predicted_cost: Part of a target step's bytes that a draft step reads; 1 where drafts are masked.
        seconds: What measuring took.
    """
    sentence, warning = what_costs_promise(costs, config, predicted_cost, seconds)
    logger.info("Sirius: %s", sentence)
    if warning is not None:
        logger.warning("%s", warning)
