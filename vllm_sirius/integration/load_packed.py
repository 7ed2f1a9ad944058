"""Loading a target whose weights vLLM packs (CPU). Drives ``vllm.model_executor.model_loader``."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader

from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.draft_plan import DraftPlan, choose_packed_kernels, plan_draft
from vllm_sirius.integration.reload import TargetReload
from vllm_sirius.integration.speculative_config import record_target_kernels
from vllm_sirius.integration.target import LoadedTarget, with_true_kernels
from vllm_sirius.integration.target_linears import choose_target_kernels, use_panels
from vllm_sirius.integration.weight_readers import WeightReaders, method_of
from vllm_sirius.target.choice import TargetKernels

logger = init_logger("vllm.sirius")


def load_target(vllm_config: Any) -> LoadedTarget:
    """Loads the target as upstream does, and refuses it before its weights load if it cannot be drafted with.

    Args:
        vllm_config: The engine's config.

    Returns:
        The target.

    Raises:
        SiriusUnsupportedError: If the model has no gated FFN, or weights that cannot be read or are not finite.
    """
    given = vllm_config.speculative_config.sirius
    loader = get_model_loader(vllm_config.load_config)
    create_model = loader.create_model
    built: list[_Building] = []

    def create_and_check(*args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = create_model(*args, **kwargs)
        built.append(_Building(vllm_config, model))
        return model

    loader.create_model = create_and_check
    model = loader.load_model(vllm_config=vllm_config, model_config=vllm_config.model_config)
    if not built:
        raise SiriusUnsupportedError(
            f"load_format={vllm_config.load_config.load_format!r}: its loader {type(loader).__name__} builds the model without "
            "create_model, so that Sirius could not read the weights before vLLM packed them: use load_format 'auto', "
            "'safetensors', 'sharded_state' or 'runai_streamer', or serve without --speculative-model sirius."
        )
    return with_true_kernels(built[0].finish(model), vllm_config, given)


class _Building:
    """A target between the building of its modules and the end of its loading."""

    def __init__(self, vllm_config: Any, model: nn.Module) -> None:
        self._plan: DraftPlan = plan_draft(vllm_config, model, choose_packed_kernels, packed=True)
        self._kernels: TargetKernels = choose_target_kernels(vllm_config, self._plan.config)
        record_target_kernels(vllm_config, self._kernels.panels)
        if self._kernels.panels:
            _want_panels(model)
        self._readers = WeightReaders(self._plan)
        if self._plan.copies:
            logger.info("Sirius: copies the draft's weights to %s once they are loaded", _kind(self._plan))

    def finish(self, model: nn.Module) -> LoadedTarget:
        """Makes the target of what was read."""
        self._readers.finish(model)
        plan, readers = self._plan, self._readers
        if readers.num_copied:
            logger.info("Sirius: copied %d layers to %s in %.1f s", readers.num_copied, _kind(plan), readers.seconds)
        head = plan.parts.head

        def remake() -> None:
            _refresh_head(head, self._kernels.panels)
            readers.finish(model)
            logger.info("Sirius: copied %d layers again in %.1f s", readers.num_copied, readers.seconds)

        _give_head_panels(head, self._kernels.panels)
        return LoadedTarget(
            model,
            plan,
            readers.neuron_norms,
            readers.backend() if plan.kernels.native else None,
            plan.kernels,
            TargetReload(model, remake, readers),
            linears=readers.linears(),
            target_kernels=self._kernels,
        )


def _kind(plan: DraftPlan) -> str:
    return plan.config.draft_weights if plan.config.draft_bits is not None else "rows of their own values"


def _want_panels(model: nn.Module) -> None:
    for layer in model.modules():
        method = method_of(layer) if isinstance(layer, LinearBase) else None
        weight: Any = getattr(layer, "weight", None)
        if method is not None and weight is not None and weight.dim() == 2:
            method.panels = True


def _give_head_panels(head: Any, panels: bool) -> None:
    """An lm_head keeps its plain weight, as upstream has it: the embedding may read it too."""
    if panels and isinstance(head, VocabParallelEmbedding) and _is_plain(head):
        use_panels(head, keep_weight=True)


def _refresh_head(head: Any, panels: bool) -> None:
    """Packs the lm_head anew. Upstream forgets one that is tied to an embedding: no weight is loaded into it itself."""
    if not isinstance(head, VocabParallelEmbedding) or not _is_plain(head):
        return
    if panels:
        use_panels(head, keep_weight=True)
    else:
        head.quant_method.process_weights_after_loading(head)


def _is_plain(head: Any) -> bool:
    return isinstance(head.quant_method, UnquantizedEmbeddingMethod)
