"""The drafts that are measured, and the settings that a user gets. Leaf module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

THRESHOLD = 0.1
"""Likelihood threshold of the lossy rule."""

ABOVE_EVERY_LIKELIHOOD = 2.0
"""Threshold with which greedy requests of a threshold engine accept exactly what a lossless engine accepts."""

RULES = ("lossless", "threshold")


@dataclass(frozen=True)
class Draft:
    """One way of drafting.

    Attributes:
        title: Name in tables.
        options: Its keys of ``speculative_config``.
        quick: Whether it belongs to the smaller grid.
    """

    title: str
    options: dict[str, Any] = field(hash=False)
    quick: bool = False

    @property
    def low_bit(self) -> bool:
        """Whether it reads quantised copies, which need compiled CPU kernels."""
        return self.options.get("draft_weights", "shared") != "shared"

    def speculative_config(self, kernel_size: int, acceptance: str, adaptive: bool = False) -> dict[str, Any]:
        """The settings of an engine with this draft.

        Args:
            kernel_size: Most tokens per verification pass.
            acceptance: One of `RULES`.
            adaptive: Whether drafts may be shorter. Predictions hold for one length alone.

        Returns:
            What ``--speculative-config`` accepts.
        """
        options = {"method": "sirius", "kernel_size": kernel_size, **self.options, "acceptance": acceptance}
        if acceptance == "threshold":
            options["threshold"] = THRESHOLD
        return {**options, "adaptive": adaptive}


DRAFTS = (
    Draft("coarse 0.5", {"sparsity": "coarse", "density": 0.5, "draft_weights": "shared"}, quick=True),
    Draft("fine 0.5", {"sparsity": "fine", "density": 0.5, "draft_weights": "shared"}),
    Draft("int8 FFN", {"sparsity": "none", "draft_weights": "int8", "draft_weights_scope": "ffn"}),
    Draft("int8 all", {"sparsity": "none", "draft_weights": "int8", "draft_weights_scope": "all"}, quick=True),
    Draft("int4 FFN", {"sparsity": "none", "draft_weights": "int4", "draft_weights_scope": "ffn"}),
    Draft("int4 all", {"sparsity": "none", "draft_weights": "int4", "draft_weights_scope": "all"}, quick=True),
    Draft(
        "coarse 0.5, int8 all",
        {"sparsity": "coarse", "density": 0.5, "draft_weights": "int8", "draft_weights_scope": "all"},
    ),
)


DEFAULT_DRAFTS = ("int4 all", "coarse 0.5")
"""Titles of what is drafted with unless told otherwise: on CPU, and where quantised copies cannot be drafted with."""


def choose_drafts(drafts: Sequence[Draft], quick: bool, low_bit: bool) -> list[Draft]:
    """The drafts that can be measured here.

    Args:
        drafts: The grid.
        quick: Whether the smaller grid is wanted.
        low_bit: Whether quantised copies can be drafted with.

    Returns:
        The drafts, in the order of the grid.
    """
    return [draft for draft in drafts if (draft.quick or not quick) and (low_bit or not draft.low_bit)]
