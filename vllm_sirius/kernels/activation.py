"""The activations of gated FFNs that reduced FFNs know. Pure PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch
import torch.nn.functional as F


class Activation(StrEnum):
    """The activation of an FFN's gate; members compare equal to their names as strings."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    GELU = "gelu"

    @property
    def function(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The PyTorch function, element-wise in the dtype of its input."""
        return _FUNCTIONS[self]


def _gelu_tanh(gate: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh")


_FUNCTIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU_TANH: _gelu_tanh,
    Activation.GELU: F.gelu,
}
