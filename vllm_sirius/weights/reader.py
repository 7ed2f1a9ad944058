"""Reading a layer's weight whatever holds it: one `WeightReader` for each way of storing a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

Seen = Callable[[torch.Tensor], None]
"""Is shown the plain values of a weight, ``[outputs, inputs]``, and keeps no reference to them."""


class WeightReader(ABC):
    """One way of storing a weight.

    A weight is shown when it is loaded and again whenever it is loaded anew, so that what was derived from it can be made again.

    Attributes:
        packs: Whether plain values are gone once the weight is loaded, so that drafts need copies of their own.
    """

    packs: ClassVar[bool]

    @abstractmethod
    def holds(self, layer: nn.Module) -> bool:
        """Whether a linear layer stores its weight in this way."""

    @abstractmethod
    def watch(self, layer: nn.Module, seen: Seen) -> None:
        """Shows the weight of a layer from now on.

        Args:
            layer: A linear layer that stores its weight in this way.
            seen: Is shown the weight.
        """

    @abstractmethod
    def show_again(self) -> None:
        """After weights were loaded anew: shows those that were not shown while they were loaded."""
