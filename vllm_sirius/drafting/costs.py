"""What a draft step and a correction pass cost on this machine: measured, and followed while the engine runs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

FOLLOW_RATE = 0.1
"""Weight of one new measurement."""

LARGEST_CHANGE = 2.0
"""A measurement further off than this factor says more about another program than about the cost: it counts as this far."""


class CostCurve:
    """Seconds of a pass by its size: straight lines between measured sizes.

    Args:
        measured: Seconds by size, at least one size, all above 0.
    """

    def __init__(self, measured: Mapping[int, float]) -> None:
        self._sizes = sorted(measured)
        self._seconds = [measured[size] for size in self._sizes]

    def seconds(self, size: int) -> float:
        """The estimate for one size; beyond the largest measured one the last line goes on.

        Args:
            size: Rows or tokens of the pass, at least 1.
        """
        return sum(weight * self._seconds[index] for index, weight in self._neighbours(size))

    def observe(self, size: int, seconds: float) -> None:
        """Moves the estimate towards a measurement.

        Args:
            size: Rows or tokens of the pass.
            seconds: What it took.
        """
        estimate = self.seconds(size)
        change = min(max(seconds / estimate, 1.0 / LARGEST_CHANGE), LARGEST_CHANGE)
        for index, weight in self._neighbours(size):
            # Beyond the last size the weights are not parts of one; only their sizes matter here.
            step = FOLLOW_RATE * min(abs(weight), 1.0)
            self._seconds[index] *= 1.0 + step * (change - 1.0)

    def as_dict(self) -> dict[str, float]:
        """Seconds by size, for reports."""
        return {str(size): seconds for size, seconds in zip(self._sizes, self._seconds, strict=True)}

    def _neighbours(self, size: int) -> list[tuple[int, float]]:
        """Indices and weights of the measured sizes that the line through `size` stands on."""
        if len(self._sizes) == 1 or size <= self._sizes[0]:
            return [(0, 1.0)]
        right = min(bisect_left(self._sizes, size), len(self._sizes) - 1)
        left = right - 1
        part = (size - self._sizes[left]) / (self._sizes[right] - self._sizes[left])
        return [(left, 1.0 - part), (right, part)]


class StepCosts:
    """Costs of one engine.

    Attributes:
        draft: Seconds of a draft step by its rows.
        target: Seconds of the target's pass by its tokens, with everything around it but drafting.

    Args:
        draft: Measured at start-up.
        target: Measured at start-up.
    """

    def __init__(self, draft: Mapping[int, float], target: Mapping[int, float]) -> None:
        self.draft = CostCurve(draft)
        self.target = CostCurve(target)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Both curves, for reports."""
        return {"draft_seconds": self.draft.as_dict(), "target_seconds": self.target.as_dict()}
