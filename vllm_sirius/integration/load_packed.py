"""Loading a target whose weights vLLM packs (CPU). Drives ``vllm.model_executor.model_loader``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader

from vllm_sirius.config import SiriusConfig
from vllm_sirius.correction.choice import TargetKernels
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.ffn.backends import Backend, CoarseRowsBackend, FineRowsBackend, LowBitPanelsBackend
from vllm_sirius.ffn.kernels.native import KernelChoice, choose_kernels
from vllm_sirius.ffn.locate import GatedFFN, locate_gated_ffns
from vllm_sirius.ffn.low_bit import LowBitRows
from vllm_sirius.ffn.low_bit_linears import LowBitLinears, LowBitWeight, quantise_linear
from vllm_sirius.ffn.low_bit_panels import LowBitPanels, interleave
from vllm_sirius.ffn.weights import by_neuron, gates_first, neuron_norms, neuron_rows
from vllm_sirius.integration.model_shape import ModelShape, measure_shape
from vllm_sirius.integration.speculative_config import record_target_kernels, resolve_draft
from vllm_sirius.integration.target import LoadedTarget, check_activations, with_true_kernels
from vllm_sirius.integration.target_linears import choose_target_kernels, use_panels


class _ReadLinearMethod(UnquantizedLinearMethod):
    """Upstream's method for a linear layer that lets `readers` see the plain weight once it is loaded.

    vLLM's CPU build then packs the weight and drops the plain one, so this is the last moment. With `panels`, Sirius packs
    it for its own kernel instead.
    """

    readers: list[Callable[[torch.Tensor], None]]
    panels: bool

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight: Any = layer.weight
        for reader in self.readers:
            reader(weight.data)
        # Upstream leaves layers with this mark unpacked, because it reads their weight later.
        if self.panels and not getattr(layer, "_cpu_skip_gemm_dispatch", False):
            use_panels(layer)
        else:
            super().process_weights_after_loading(layer)


def _method_of(layer: nn.Module) -> _ReadLinearMethod | None:
    """The layer's own method, made to be read; ``None`` where its weights are not plain."""
    method: Any = getattr(layer, "quant_method", None)
    if type(method) is UnquantizedLinearMethod:
        method.__class__ = _ReadLinearMethod
        method.readers, method.panels = [], False
    return method if type(method) is _ReadLinearMethod else None


def _watch(layer: nn.Module, name: str, reader: Callable[[torch.Tensor], None]) -> None:
    method = _method_of(layer)
    if method is None:
        found = type(getattr(layer, "quant_method", None)).__name__
        raise SiriusUnsupportedError(
            f"{name!r} stores its weights by {found}, whose rows cannot be read yet: serve the unquantised checkpoint."
        )
    method.readers.append(reader)


class _FFNReader:
    """Collects what the draft needs of one FFN's weights: the neurons' norms, and their rows if wanted.

    Args:
        ffn: The FFN.
        want_rows: Whether kernels will read rows.
        bits: Bits of a copied weight, or ``None`` for copies of the values as they are.
        sparsity: What drafts keep: ``coarse``, ``fine`` or ``none``.
    """

    def __init__(self, ffn: GatedFFN, want_rows: bool, bits: int | None, sparsity: str) -> None:
        self.norms: torch.Tensor | None = None
        self.rows: torch.Tensor | LowBitRows | None = None
        self.panels: dict[str, Any] = {}
        self._ffn = ffn
        self._whole = sparsity == "none"
        self._layout = gates_first if sparsity == "fine" else by_neuron
        self._want_rows = want_rows
        self._bits = bits
        self._plain: dict[str, torch.Tensor] = {}
        _watch(ffn.gate_up, ffn.name, lambda weight: self._read("gate_up", weight))
        _watch(ffn.down, ffn.name, lambda weight: self._read("down", weight))

    def _read(self, part: str, weight: torch.Tensor) -> None:
        if part == "down":
            self.norms = neuron_norms(weight)
        if not self._want_rows:
            return
        if self._bits == 4 and self._whole:
            self._round_to_panels(part, weight)
            return
        if self._bits is not None:
            self._round(part, weight, self._bits)
            return
        self._plain[part] = weight
        if len(self._plain) == 2:
            self.rows = neuron_rows(self._plain["gate_up"], self._plain["down"], self._ffn.gate_first, self._layout)
            self._plain.clear()

    def _round(self, part: str, weight: torch.Tensor, bits: int) -> None:
        place = self._layout(self._ffn.num_neurons, self._ffn.hidden_size)
        if self.rows is None:
            self.rows = LowBitRows.empty(bits, place.shape)
        assert isinstance(self.rows, LowBitRows)
        if part == "down":
            self.rows.fill(place.down, weight.t())
            return
        halves = weight.split(self._ffn.num_neurons)
        gate, up = halves if self._ffn.gate_first else halves[::-1]
        self.rows.fill(place.gate, gate)
        self.rows.fill(place.up, up)

    def _round_to_panels(self, part: str, weight: torch.Tensor) -> None:
        if part == "down":
            self.panels[part] = LowBitPanels.quantise(weight)
            return
        first, second = (LowBitPanels.quantise(half) for half in weight.split(self._ffn.num_neurons))
        self.panels[part] = interleave(first, second) if self._ffn.gate_first else interleave(second, first)


class _LinearReader:
    """Copies the linear layers outside of the FFNs in few bits.

    Args:
        model: The model, before its weights load.
        ffns: Its FFNs.
        bits: Bits of a copied weight.
    """

    def __init__(self, model: nn.Module, ffns: list[GatedFFN], bits: int) -> None:
        self._bits = bits
        self._rows: dict[nn.Module, LowBitWeight] = {}
        known = {id(layer) for ffn in ffns for layer in (ffn.gate_up, ffn.down)}
        for name, layer in model.named_modules():
            if isinstance(layer, LinearBase) and id(layer) not in known and "layers." in name:
                _watch(layer, name, functools.partial(self._read, layer))

    def _read(self, layer: nn.Module, weight: torch.Tensor) -> None:
        self._rows[layer] = quantise_linear(weight, self._bits)

    def collect(self, model: Any) -> LowBitLinears:
        """The copies, that of the lm_head included, once the weights are loaded.

        Args:
            model: The loaded model.
        """
        head = getattr(model, "lm_head", None)
        if isinstance(head, VocabParallelEmbedding) and head.weight.dim() == 2:
            return LowBitLinears(self._rows, (head, quantise_linear(head.weight.data, self._bits)))
        return LowBitLinears(self._rows, None)


def load_target(vllm_config: Any) -> LoadedTarget:
    """Loads the target as upstream does, and refuses it before its weights load if it cannot be drafted with.

    Args:
        vllm_config: The engine's config.

    Returns:
        The target.

    Raises:
        SiriusUnsupportedError: If the model has no gated FFN, or one whose weights cannot be read.
    """
    given = vllm_config.speculative_config.sirius
    loader = get_model_loader(vllm_config.load_config)
    create_model = loader.create_model
    built: list[tuple[list[GatedFFN], ModelShape, list[_FFNReader], KernelChoice]] = []
    linears: list[_LinearReader] = []
    target_kernels: list[TargetKernels] = []

    def create_and_check(*args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = create_model(*args, **kwargs)
        ffns = locate_gated_ffns(model)
        kernels = _choose_kernels(vllm_config, ffns)
        config = resolve_draft(vllm_config, copies=kernels.native)
        check_activations(config, ffns)
        _check_low_bit(config, kernels)
        bits = config.draft_bits
        shape = measure_shape(model, ffns)
        target_kernels.append(choose_target_kernels(vllm_config, config))
        record_target_kernels(vllm_config, target_kernels[0].panels)
        if target_kernels[0].panels:
            _want_panels(model)
        built.append((ffns, shape, [_FFNReader(ffn, kernels.native, bits, config.sparsity) for ffn in ffns], kernels))
        if bits is not None and config.draft_weights_scope == "all":
            linears.append(_LinearReader(model, ffns, bits))
        return model

    loader.create_model = create_and_check
    model = loader.load_model(vllm_config=vllm_config, model_config=vllm_config.model_config)
    ffns, shape, readers, kernels = built[0]
    norms = [reader.norms for reader in readers if reader.norms is not None]
    assert len(norms) == len(ffns), "the loader did not process the weights of every FFN"
    backend = _make_backend(ffns, readers, vllm_config.speculative_config.sirius.sparsity) if kernels.native else None
    further = linears[0].collect(model) if linears else None
    if target_kernels[0].panels:
        _give_head_panels(model)
    target = LoadedTarget(
        model, ffns, shape, torch.cat(norms), backend, kernels, linears=further, target_kernels=target_kernels[0]
    )
    return with_true_kernels(target, vllm_config, given)


def _want_panels(model: nn.Module) -> None:
    for layer in model.modules():
        method = _method_of(layer) if isinstance(layer, LinearBase) else None
        if method is not None and getattr(layer, "weight", torch.empty(0)).dim() == 2:
            method.panels = True


def _give_head_panels(model: Any) -> None:
    """An lm_head keeps its plain weight, as upstream has it: the embedding may read it too."""
    head = getattr(model, "lm_head", None)
    if isinstance(head, VocabParallelEmbedding) and type(head.quant_method) is UnquantizedEmbeddingMethod:
        use_panels(head, keep_weight=True)


def _make_backend(ffns: list[GatedFFN], readers: list[_FFNReader], sparsity: str) -> Backend:
    if readers[0].panels:
        return LowBitPanelsBackend(ffns, [(reader.panels["gate_up"], reader.panels["down"]) for reader in readers])
    rows = [reader.rows for reader in readers if reader.rows is not None]
    return FineRowsBackend(ffns, rows) if sparsity == "fine" else CoarseRowsBackend(ffns, rows)


def _check_low_bit(config: SiriusConfig, kernels: KernelChoice) -> None:
    if config.draft_bits is not None and not kernels.native:
        raise SiriusUnsupportedError(
            f"draft_weights={config.draft_weights!r} needs the compiled kernels, which cannot be used here "
            f"({kernels.reason}): use draft_weights='shared'."
        )


def _choose_kernels(vllm_config: Any, ffns: list[GatedFFN]) -> KernelChoice:
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        return KernelChoice(False, "tensor parallel")
    if any(ffn.activation is None for ffn in ffns):
        return KernelChoice(False, "activation without a kernel")
    if any(getattr(layer, "bias", None) is not None for ffn in ffns for layer in (ffn.gate_up, ffn.down)):
        return KernelChoice(False, "FFN with bias")
    return choose_kernels(vllm_config.model_config.dtype, vllm_config.device_config.device)
