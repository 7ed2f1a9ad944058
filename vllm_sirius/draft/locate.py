"""Finds the gated FFNs of any vLLM model by their structure, not by their class.

A gated FFN is a module with a merged gate-and-up projection (two equal output halves), an ``...AndMul`` activation and
a down projection. Experts of MoE layers and encoders of other modalities are left dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.kernels.activation import Activation

GATE_UP_NAMES = ("gate_up_proj", "w13", "up_gate_proj", "gate_proj_up_proj")
DOWN_NAMES = ("down_proj", "w2", "c_proj", "linear_2", "output_linear")
ACTIVATION_NAMES = ("act_fn", "act", "activation")
OTHER_MODALITIES = ("vision", "visual", "audio", "image", "speech", "encoder.")
EXPERT_NAMES = ("experts", "shared_expert")


@dataclass(frozen=True)
class GatedFFN:
    """One gated FFN of the target.

    Attributes:
        name: Path of the module in the model.
        module: The FFN itself.
        gate_up: Its merged projection, weight ``[2 * neurons, hidden_size]``.
        down: Its down projection, weight ``[hidden_size, neurons]``.
        activation_name: Attribute of `module` that holds the activation.
        activation: The activation of the gate half alone, or ``None`` if it is one that only coarse sparsity can handle, by
            masking its result.
        gate_first: Whether the gate is the first half of the merged projection.
        hidden_size: Width of the model.
        num_neurons: Neurons on this tensor-parallel rank.
    """

    name: str
    module: nn.Module
    gate_up: nn.Module
    down: nn.Module
    activation_name: str
    activation: Activation | None
    gate_first: bool
    hidden_size: int
    num_neurons: int

    @property
    def num_parameters(self) -> int:
        """Weights of the three matrices on this rank."""
        return 3 * self.hidden_size * self.num_neurons


def locate_gated_ffns(model: nn.Module) -> list[GatedFFN]:
    """Lists the gated FFNs of a model in layer order.

    Args:
        model: A vLLM model, loaded or not; only module structure is read.

    Returns:
        At least one FFN.

    Raises:
        SiriusUnsupportedError: If there is none, or if an FFN's activation is not known.
    """
    found = []
    for name, module in language_model(model).named_modules():
        lowered = f"{name}."
        if any(part in lowered for part in OTHER_MODALITIES + EXPERT_NAMES):
            continue
        ffn = _as_gated_ffn(name, module)
        if ffn is not None:
            found.append(ffn)
    if not found:
        raise SiriusUnsupportedError(
            f"model class {type(model).__name__} has no dense gated FFN (a merged gate-and-up projection, an activation "
            "and a down projection): the draft has nothing to reduce, so serve this model without --speculative-model sirius."
        )
    return found


def language_model(model: nn.Module) -> nn.Module:
    """The part of a model that decodes text: the model itself unless it has other modalities.

    Args:
        model: A vLLM model.
    """
    getter = getattr(model, "get_language_model", None)
    return getter() if callable(getter) else model


def _as_gated_ffn(name: str, module: nn.Module) -> GatedFFN | None:
    gate_up = _child(module, GATE_UP_NAMES)
    down = _child(module, DOWN_NAMES)
    activation_name = next((n for n in ACTIVATION_NAMES if isinstance(getattr(module, n, None), nn.Module)), None)
    if gate_up is None or down is None or activation_name is None:
        return None
    sizes = getattr(gate_up, "output_partition_sizes", None)
    if sizes is None or len(sizes) != 2 or sizes[0] != sizes[1]:
        return None
    if getattr(down, "input_size_per_partition", None) != sizes[0]:
        return None
    activation, gate_first = _split_activation(name, getattr(module, activation_name))
    return GatedFFN(
        name=name,
        module=module,
        gate_up=gate_up,
        down=down,
        activation_name=activation_name,
        activation=activation,
        gate_first=gate_first,
        hidden_size=int(gate_up.input_size),  # type: ignore[arg-type]
        num_neurons=int(sizes[0]),
    )


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return getattr(child, "base_layer", child)
    return None


def _split_activation(name: str, module: Any) -> tuple[Activation | None, bool]:
    """The activation of the gate, and whether the gate is the first half."""
    kind = type(module).__name__
    if kind == "SiluAndMul":
        return Activation.SILU, True
    if kind == "MulAndSilu":
        return Activation.SILU, False
    if kind == "GeluAndMul":
        return (Activation.GELU_TANH if module.approximate == "tanh" else Activation.GELU), True
    if "AndMul" in kind:
        return None, True
    raise SiriusUnsupportedError(
        f"the FFN {name!r} uses the activation {kind}, which is not known to multiply a gate with an up half: serve this "
        "model without --speculative-model sirius, or report the model so that it can be added."
    )
