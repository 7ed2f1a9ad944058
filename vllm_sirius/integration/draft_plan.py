"""What a draft of a model will copy and read, known before the weights load: `doctor` tells it, a loading engine follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vllm_sirius.config import SiriusConfig
from vllm_sirius.draft.backends import Backend
from vllm_sirius.draft.locate import GatedFFN
from vllm_sirius.draft.low_bit_linears import LowBitLinears
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.model_parts import ModelParts, find_parts, step_bytes
from vllm_sirius.integration.target_linears import choose_target_kernels
from vllm_sirius.integration.weight_readers import check_readable
from vllm_sirius.kernels.native import KernelChoice, choose_kernels
from vllm_sirius.target.choice import TargetKernels
from vllm_sirius.weights.low_bit import LowBitRows
from vllm_sirius.weights.low_bit_panels import LowBitPanels
from vllm_sirius.weights.reader import WeightReader
from vllm_sirius.weights.rows import rows_read


@dataclass(frozen=True)
class CopiedLinear:
    """A layer outside of the FFNs that drafts run on a quantised copy.

    Attributes:
        name: Its path.
        module: The layer.
        num_outputs: Rows of its weight.
        width: Columns of its weight.
        num_bytes: Bytes of its weight as the target reads it.
    """

    name: str
    module: nn.Module
    num_outputs: int
    width: int
    num_bytes: int


@dataclass(frozen=True)
class DraftPlan:
    """What a draft will read in place of the target's weights. Bytes are those of one tensor-parallel rank.

    Attributes:
        parts: Parts of the model.
        config: The options, with ``auto`` decided.
        kernels: What will compute the reduced FFNs.
        target_kernels: What will run the target's own linear layers.
        copies: Whether drafts read weights of their own, not the target's.
        step_bytes: Weight bytes that a dense decoding step reads.
        ffn_bytes: Part of them that belongs to the gated FFNs.
        element_size: Bytes of one weight of the FFNs.
        linears: Layers of the decoder that are copied.
        head: The lm_head, if it is copied.
    """

    parts: ModelParts
    config: SiriusConfig
    kernels: KernelChoice
    target_kernels: TargetKernels
    copies: bool
    step_bytes: int
    ffn_bytes: int
    element_size: int
    linears: list[CopiedLinear]
    head: CopiedLinear | None

    def masked(self, given: SiriusConfig, reason: str) -> DraftPlan:
        """The plan where drafts turn out to run masked on the target's own weights.

        Args:
            given: The options as the user gave them, none of which needs copies.
            reason: Why.
        """
        decided = given.resolved(copies=False)
        config = replace(self.config, sparsity=decided.sparsity, draft_weights=decided.draft_weights)
        return replace(self, config=config, kernels=KernelChoice(False, reason), copies=False, linears=[], head=None)

    @property
    def ffns(self) -> list[GatedFFN]:
        """The gated FFNs."""
        return self.parts.ffns

    @property
    def num_neurons(self) -> int:
        """Neurons of the first FFN."""
        return self.ffns[0].num_neurons

    @property
    def ffn_share(self) -> float:
        """Part of a dense step's bytes that belongs to gated FFNs."""
        return self.ffn_bytes / self.step_bytes

    @property
    def draft_density(self) -> float:
        """Part of a dense step's bytes that a draft step will read."""
        if not self.kernels.native:
            return 1.0
        ffns = sum(_ffn_bytes(ffn, self.config, self.element_size, self.config.density) for ffn in self.ffns)
        return (self._kept_bytes + ffns + self._linear_bytes) / self.step_bytes

    @property
    def copied_bytes(self) -> int:
        """Memory that copies of weights will take: none where drafts read the target's own."""
        if not self.copies:
            return 0
        return sum(_ffn_bytes(ffn, self.config, self.element_size, 1.0) for ffn in self.ffns) + self._linear_bytes

    def counted_density(self, backend: Backend | None, linears: LowBitLinears | None) -> float:
        """Part of a dense step's bytes that a draft step reads, counted from what was made.

        Args:
            backend: Kernels bound to the FFNs' weights, or ``None`` where drafts are masked.
            linears: The copies of further layers.
        """
        if backend is None:
            return 1.0
        copies = linears.num_bytes if linears is not None else 0
        ffns = backend.draft_bytes(self.config.density, self.config.sparsity)
        return (self._kept_bytes + ffns + copies) / self.step_bytes

    @property
    def _copied(self) -> list[CopiedLinear]:
        return self.linears if self.head is None else [*self.linears, self.head]

    @property
    def _kept_bytes(self) -> int:
        """Weights that a draft step reads as the target does."""
        return self.step_bytes - self.ffn_bytes - sum(layer.num_bytes for layer in self._copied)

    @property
    def _linear_bytes(self) -> int:
        bits = self.config.draft_bits
        if bits == 4:
            return sum(LowBitPanels.bytes_of(layer.num_outputs, layer.width) for layer in self._copied)
        return sum(layer.num_outputs * LowBitRows.bytes_of_row(bits or 8, layer.width) for layer in self._copied)


def _ffn_bytes(ffn: GatedFFN, config: SiriusConfig, element_size: int, density: float) -> int:
    """Bytes of an FFN that a draft reads; at density 1 those of the whole copy."""
    width, bits = ffn.hidden_size, config.draft_bits
    if bits == 4 and config.sparsity == "none":
        return 2 * LowBitPanels.bytes_of(ffn.num_neurons, width) + LowBitPanels.bytes_of(width, ffn.num_neurons)
    row = element_size * width if bits is None else LowBitRows.bytes_of_row(bits, width)
    return row * rows_read(ffn.num_neurons, density, config.sparsity)


def plan_draft(
    vllm_config: Any, model: nn.Module, choose: Callable[[Any, list[GatedFFN]], KernelChoice], reader: WeightReader
) -> DraftPlan:
    """Decides what drafts of a model read, or refuses the model.

    Args:
        vllm_config: The engine's config.
        model: The model, with its weights in their plain shapes; meta tensors will do.
        choose: Chooses what computes the reduced FFNs.
        reader: Reads the model's weights.

    Returns:
        The plan.

    Raises:
        SiriusUnsupportedError: If the model cannot be drafted with.
    """
    parts = find_parts(model)
    for ffn in parts.ffns:
        for layer in (ffn.gate_up, ffn.down):
            check_readable(reader, layer, ffn.name)
    kernels = choose(vllm_config, parts.ffns)
    copies = reader.packs and kernels.native
    given: SiriusConfig = vllm_config.speculative_config.sirius
    config = given.resolved(copies, "" if kernels.native else kernels.reason)
    check_activations(config, parts.ffns)
    _check_low_bit(config, kernels, reader)
    target_kernels = _choose_target_kernels(vllm_config, config, reader)
    copied: dict[str, nn.Module] = {}
    head: CopiedLinear | None = None
    if config.draft_bits is not None and config.draft_weights_scope == "all":
        copied = parts.linears
        if parts.head is not None:
            head = _copied_linear("lm_head", parts.head)
    for name, layer in copied.items():
        check_readable(reader, layer, name)
    size = int(parts.ffns[0].gate_up.weight.element_size())  # type: ignore[operator]
    return DraftPlan(
        parts,
        replace(config, target_kernels="sirius" if target_kernels.panels else "vllm"),
        kernels,
        target_kernels,
        copies,
        step_bytes(model, parts.head),
        size * sum(ffn.num_parameters for ffn in parts.ffns),
        size,
        [_copied_linear(name, layer) for name, layer in copied.items()],
        head,
    )


def _choose_target_kernels(vllm_config: Any, config: SiriusConfig, reader: WeightReader) -> TargetKernels:
    if reader.packs:
        return choose_target_kernels(vllm_config, config)
    if config.target_kernels == "sirius":
        raise SiriusUnsupportedError(
            "target_kernels='sirius' is for CPU: use 'auto' or 'vllm', which are the same here."
        )
    return TargetKernels(False, "Sirius has none for this device")


def _copied_linear(name: str, layer: Any) -> CopiedLinear:
    weight = layer.weight
    num_outputs, width = weight.shape
    return CopiedLinear(
        getattr(layer, "prefix", "") or name, layer, num_outputs, width, weight.numel() * weight.element_size()
    )


def check_activations(config: SiriusConfig, ffns: list[GatedFFN]) -> None:
    """Refuses fine sparsity for activations that hide the gate.

    Args:
        config: The options.
        ffns: The target's FFNs.

    Raises:
        SiriusUnsupportedError: If there is such an activation.
    """
    unknown = next((ffn for ffn in ffns if ffn.activation is None), None)
    if unknown is not None and config.sparsity == "fine":
        kind = type(getattr(unknown.module, unknown.activation_name)).__name__
        raise SiriusUnsupportedError(
            f"sparsity='fine' needs the gate of each neuron, which the activation {kind} of the FFN {unknown.name!r} does not "
            "show: use sparsity='coarse'."
        )


def _check_low_bit(config: SiriusConfig, kernels: KernelChoice, reader: WeightReader) -> None:
    if config.draft_bits is None:
        return
    if not reader.packs:
        raise SiriusUnsupportedError(
            f"draft_weights={config.draft_weights!r} is for CPU so far: use draft_weights='shared', which costs no memory here."
        )
    if not kernels.native:
        raise SiriusUnsupportedError(
            f"draft_weights={config.draft_weights!r} needs the compiled kernels, which cannot be used here "
            f"({kernels.reason}): use draft_weights='shared'."
        )


def choose_packed_kernels(vllm_config: Any, ffns: list[GatedFFN]) -> KernelChoice:
    """What computes the reduced FFNs on CPU. Arguments as `plan_draft` hands them over.

    Args:
        vllm_config: The engine's config.
        ffns: The target's FFNs.

    Returns:
        The choice.
    """
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        return KernelChoice(False, "tensor parallel")
    reason = why_no_kernel(ffns)
    if reason:
        return KernelChoice(False, reason)
    return choose_kernels(vllm_config.model_config.dtype, vllm_config.device_config.device)


def why_no_kernel(ffns: list[GatedFFN]) -> str:
    """What of a model's FFNs no kernel computes; empty where the kernels know all of it.

    Args:
        ffns: The FFNs.
    """
    if any(ffn.activation is None for ffn in ffns):
        return "activation without a kernel"
    if any(getattr(layer, "bias", None) is not None for ffn in ffns for layer in (ffn.gate_up, ffn.down)):
        return "FFN with bias"
    return ""
