"""Loading the target and reading its weights. Drives ``vllm.model_executor.model_loader``.

Where vLLM packs weights (CPU), the draft's copies are made while they load; `load_target` therefore drives the loader. Where they
stay plain (GPU), `read_target` reads the loaded model, and the draft shares them: a neuron's gate and up weights are rows of
the merged projection already. Its down weights are a column; they are stored once as rows instead, and the target reads the
transposed view, which matrix libraries multiply by at the same speed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader

from vllm_sirius.draft.backends import TritonBackend
from vllm_sirius.draft.copies import DraftCopies
from vllm_sirius.draft.locate import GatedFFN
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.draft_plan import DraftPlan, choose_packed_kernels, plan_draft, why_no_kernel
from vllm_sirius.integration.finite_weights import FiniteWeights
from vllm_sirius.integration.layerwise_loading import pack_while_loading
from vllm_sirius.integration.offloaded_target import OffloadedTarget
from vllm_sirius.integration.reload import TargetReload
from vllm_sirius.integration.target import LoadedTarget, settle_target
from vllm_sirius.integration.target_linears import refresh_head, use_head_panels
from vllm_sirius.integration.weight_readers import (
    PackedReader,
    PlainReader,
    leave_lookups_alone,
    plain_weight,
    want_panels,
)
from vllm_sirius.kernels.native import KernelChoice, choose_triton
from vllm_sirius.kernels.triton.statistics import observe_ffn
from vllm_sirius.weights.reader import Seen, WeightReader
from vllm_sirius.weights.rows import store_as_rows

logger = init_logger("vllm.sirius")


def load_target(vllm_config: Any) -> LoadedTarget:
    """Loads a target whose weights vLLM packs, as upstream does; refuses it before they load if it cannot be drafted with.

    Args:
        vllm_config: The engine's config.

    Returns:
        The target.

    Raises:
        SiriusUnsupportedError: If the model has no gated FFN, or weights that cannot be read or are not finite.
    """
    loader = get_model_loader(vllm_config.load_config)
    create_model = loader.create_model
    built: list[_PackedTarget] = []

    def create_and_check(*args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = create_model(*args, **kwargs)
        built.append(_PackedTarget(vllm_config, model))
        return model

    def load_weights(model: nn.Module, model_config: Any) -> None:
        read = functools.partial(read_weights, model, model_config)
        if built:
            built[0].load(loader, read)
        else:  # refused below
            read()

    read_weights = loader.load_weights
    loader.create_model, loader.load_weights = create_and_check, load_weights
    model = loader.load_model(vllm_config=vllm_config, model_config=vllm_config.model_config)
    if not built:
        raise SiriusUnsupportedError(
            f"load_format={vllm_config.load_config.load_format!r}: its loader {type(loader).__name__} builds the model without "
            "create_model, so that Sirius could not read the weights before vLLM packed them: use load_format 'auto', "
            "'safetensors', 'sharded_state' or 'runai_streamer', or serve without --speculative-model sirius."
        )
    return settle_target(built[0].finish(model), vllm_config)


def read_target(model: nn.Module, vllm_config: Any) -> LoadedTarget:
    """Reads a loaded target whose weights stay plain, and stores its down projections as rows.

    Args:
        model: The target.
        vllm_config: The engine's config.

    Returns:
        The target.

    Raises:
        SiriusUnsupportedError: If the model has no gated FFN, or one whose weights cannot be read.
    """
    return settle_target(_PlainTarget(vllm_config, model).finish(model), vllm_config)


class _ReadWeights:
    """The weights of a target as a reader shows them, and what drafts derive from them.

    Args:
        plan: What to copy.
        reader: Reads them.

    Attributes:
        finite: What was found of values that are not finite.
        copies: What drafts read.
        restored: Whether the copies were read from where they were stored, in place of being made.
    """

    def __init__(self, plan: DraftPlan, reader: WeightReader) -> None:
        self.plan = plan
        self.reader = reader
        self.finite = FiniteWeights()
        self._head_is_shown = False
        self.restored = False
        head = plan.head.module if plan.head is not None else None
        self.copies = DraftCopies(plan.ffns, plan.config, plan.copies, head)
        for ffn, copy in zip(plan.ffns, self.copies.ffns, strict=True):
            self._watch(ffn.gate_up, f"{ffn.name}.gate_up", copy.read_gate_up)
            self._watch(ffn.down, f"{ffn.name}.down", copy.read_down)
        for linear in plan.linears:
            self._watch(linear.module, linear.name, functools.partial(self.copies.read_linear, linear.module))

    def watch_head(self) -> None:
        """Reads the lm_head while it is loaded, because its plain weight is gone afterwards."""
        assert self.plan.head is not None
        self._head_is_shown = True
        self._watch(self.plan.head.module, self.plan.head.name, self.copies.read_head)

    def begin(self) -> None:
        """Before weights are loaded."""
        self.finite = FiniteWeights()
        self.copies.begin()

    def drop(self) -> None:
        """Frees the copies."""
        self.copies.drop()

    def finish(self, model: nn.Module) -> None:
        """After weights were loaded.

        Raises:
            SiriusUnsupportedError: If a weight has NaN or infinite values.
        """
        if self.plan.head is not None and not self._head_is_shown and not self.restored:
            weight = plain_weight(self.plan.head.module)
            self.finite.check(self.plan.head.name, weight)
            started = time.perf_counter()
            self.copies.read_head(weight)
            self.copies.seconds += time.perf_counter() - started
        self.finite.check_small(model)
        self.finite.raise_if_not()
        assert all(ffn.num_read >= 2 for ffn in self.copies.ffns), "the loader did not process every FFN's weights"

    def _watch(self, layer: Any, name: str, seen: Seen) -> None:
        def check_and_time(weight: torch.Tensor) -> None:
            started = time.perf_counter()
            self.finite.check(getattr(layer, "prefix", "") or name, weight)
            seen(weight)
            self.copies.seconds += time.perf_counter() - started

        self.reader.watch(layer, check_and_time)


class _PackedTarget:
    """A target of the CPU build between the building of its modules and the end of its loading."""

    def __init__(self, vllm_config: Any, model: nn.Module) -> None:
        reader = PackedReader()
        self._model = model
        self._plan = plan_draft(vllm_config, model, choose_packed_kernels, reader)
        head = self._plan.parts.head
        self._weights = _ReadWeights(self._plan, reader)
        if self._plan.target_kernels.panels:
            own_head = want_panels(model, head, reader)
            if own_head and self._plan.head is not None:
                self._weights.watch_head()
        leave_lookups_alone(model, head, self._plan.target_kernels.panels)
        self._offloaded: OffloadedTarget | None = None
        if self._plan.config.offload == "disk":
            self._offloaded = OffloadedTarget(vllm_config, model, self._plan, reader, self._weights.copies)
        # What else there is, such as a vision tower, is stored as it was loaded.
        pack_while_loading(model, None if self._offloaded is None else self._offloaded.packed_layers)
        if self._plan.copies:
            logger.info("Sirius: copies the draft's weights to %s while they load", _kind(self._plan))

    def load(self, loader: Any, read_weights: Callable[[], None]) -> None:
        """Loads the weights.

        Args:
            loader: Upstream's loader.
            read_weights: Reads the checkpoint.
        """
        if self._offloaded is None:
            read_weights()
            return
        self._offloaded.load(loader, self._model, read_weights)
        self._weights.restored = self._offloaded.restored

    def finish(self, model: nn.Module) -> LoadedTarget:
        """Makes the target of what was read."""
        plan, weights = self._plan, self._weights
        copies, panels, head = weights.copies, plan.target_kernels.panels, plan.parts.head
        streamed = None
        try:
            weights.finish(model)
            if self._offloaded is not None:
                streamed = self._offloaded.finish()
        except BaseException:
            if self._offloaded is not None:
                self._offloaded.abandon()
            raise
        if copies.num_copied:
            logger.info("Sirius: copied %d layers to %s in %.1f s", copies.num_copied, _kind(plan), copies.seconds)

        def remake() -> None:
            refresh_head(head, panels)
            weights.finish(model)
            logger.info("Sirius: copied %d layers again in %.1f s", copies.num_copied, copies.seconds)

        if streamed is None:
            use_head_panels(head, panels)
        backend = copies.backend() if plan.kernels.native else None
        fixed = "" if streamed is None else "offload='disk'"
        reload = TargetReload(model, remake, weights, fixed=fixed)
        memory = self._offloaded.memory if self._offloaded is not None else None
        return LoadedTarget(
            model,
            plan,
            copies.neuron_norms,
            backend,
            reload,
            linears=copies.linears(),
            streamed=streamed,
            memory=memory,
        )


class _PlainTarget:
    """A loaded target whose weights stay as they are: nothing is copied."""

    def __init__(self, vllm_config: Any, model: nn.Module) -> None:
        self._reader = PlainReader()
        self._plan = plan_draft(vllm_config, model, _choose_triton_kernels, self._reader)
        for ffn in self._plan.ffns:
            _check_shapes(ffn)
        self._weights = _ReadWeights(self._plan, self._reader)

    def finish(self, model: nn.Module) -> LoadedTarget:
        """Makes the target of what was read."""
        plan, weights = self._plan, self._weights
        weights.finish(model)

        def remake() -> None:
            weights.begin()
            self._reader.show_again()
            weights.finish(model)

        reload = TargetReload(model, remake, version=lambda: _version(plan.ffns))
        norms = weights.copies.neuron_norms
        if not plan.kernels.native:
            return LoadedTarget(model, plan, norms, None, reload)
        backend = TritonBackend(
            plan.ffns,
            [plain_weight(ffn.gate_up) for ffn in plan.ffns],
            [store_as_rows(ffn.down) for ffn in plan.ffns],
            [_reduction(ffn.down) for ffn in plan.ffns],
        )
        backend.warm_up(plan.config.density, plan.config.sparsity == "fine")
        return LoadedTarget(model, plan, norms, backend, reload, observe_ffn)


def _kind(plan: DraftPlan) -> str:
    return plan.config.draft_weights if plan.config.draft_bits is not None else "rows of their own values"


def _version(ffns: list[GatedFFN]) -> int:
    """Changes when a weight is written to in place, as a reload of weights in the engine's own format does."""
    weights: list[Any] = [ffn.down.weight for ffn in ffns]
    return sum(0 if weight.is_inference() else weight._version for weight in weights)


def _check_shapes(ffn: GatedFFN) -> None:
    for layer, shape in (
        (ffn.gate_up, (2 * ffn.num_neurons, ffn.hidden_size)),
        (ffn.down, (ffn.hidden_size, ffn.num_neurons)),
    ):
        found = tuple(plain_weight(layer).shape)
        if found != shape:
            raise SiriusUnsupportedError(
                f"the FFN {ffn.name!r} stores a weight as {list(found)} and not as {list(shape)}, so that its rows cannot be "
                "read: serve the unquantised checkpoint."
            )


def _reduction(down: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What turns this rank's part of the down projection into the whole, or ``None`` where it is the whole."""
    if down.tp_size > 1 and down.reduce_results:
        return tensor_model_parallel_all_reduce
    return None


def _choose_triton_kernels(vllm_config: Any, ffns: list[GatedFFN]) -> KernelChoice:
    reason = why_no_kernel(ffns)
    return KernelChoice(False, reason) if reason else choose_triton(plain_weight(ffns[0].gate_up))
