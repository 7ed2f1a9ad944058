"""What passes cost by their size: measured at start-up, and learnt anew by every size while the engine runs.

The one model of seconds by size, for the draft's steps (by the tokens they are fed) and the target's passes. Four things
hold whatever is observed:

* a larger pass never costs less, and nothing costs nothing;
* each size learns for itself: what another size costs matters only where it has not run yet, or where order demands it;
* the median of a size's newest observations counts, so single ones that were held up do not matter;
* what was measured at start-up is a first estimate, which observations replace within a few passes. So is what a size took
  while another one took clearly more than it does now: the machine was busy then. That is a *doubt*. Doubts
  never add up: they make nothing faster than it was ever seen, unless a size is faster itself than it was ever seen, and
  then nothing that is doubtful already.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

WINDOW = 15
"""Newest observations of a size whose median counts."""

ENOUGH = 3
"""Observations of a size that a spike does not spoil."""

FRESH = 100
"""Observations of any size after which what is known of one counts half where order makes it yield."""

OLD = 500
"""Observations of any size after which one is forgotten, if newer ones of its size are `ENOUGH`."""

FASTER, FASTER_IN_A_ROW = 0.8, 2
SLOWER, SLOWER_IN_A_ROW = 1.25, 4
"""So many observations in a row beyond this part of the estimate replace all before them: the cost has changed. Nothing makes
a pass seem faster than it is, while something may hold up two."""

SHORTEST = 1e-6
"""Seconds. No pass of a model is over sooner, and all that divides by what a pass takes needs more than nothing."""

EXACT_SIZES = 32
SIZES_PER_DOUBLING = 16
"""Kernels work in blocks: every size learns alone up to the largest block, few neighbours together beyond it."""


class CostCurve:
    """Seconds of a pass by its size: straight lines between known sizes.

    Args:
        measured: First estimates, seconds by size, all above 0. What holds a measurement up only makes it longer, so that one
            above that of a larger size counts as that.
    """

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        self._first = _Line((size, max(value, SHORTEST)) for size, value in sorted((measured or {}).items()))
        self._observed: dict[int, _Observed] = {}
        self._num_observed = 0
        self._line: _Line | None = None

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self._first.sizes or self._observed)

    def seconds(self, size: int) -> float:
        """The estimate for one size. Below the smallest known size it is that one's, beyond the largest it grows in proportion.

        Args:
            size: Tokens or rows of the pass, at least 1.
        """
        if self._line is None:
            self._line = self._fit()
        return max(self._line.seconds(_learning_size(size)), SHORTEST)

    def observe(self, size: int, seconds: float) -> None:
        """Takes in what a pass took.

        Args:
            size: Its tokens or rows.
            seconds: Its duration; one that is no positive number says nothing.
        """
        if not 0.0 < seconds < math.inf:
            return
        self._num_observed += 1
        size = _learning_size(size)
        own = self._observed.get(size)
        if own is None:
            own = self._observed[size] = _Observed()
        changed = own.take_in(seconds, self._num_observed)
        estimate = self._estimate(size, own)
        if changed and estimate < own.estimate:
            self._doubt_others(own, estimate)
        # Weights fade even where estimates stay.
        if estimate != own.estimate or self._num_observed % WINDOW == 0:
            own.estimate, self._line = estimate, None
        if len(own.seconds) >= ENOUGH:
            own.best = min(own.best, estimate)

    def num_observations(self, size: int) -> int:
        """Observations that the estimate of a size stands on, those that became doubtful included; at most `WINDOW`.

        Args:
            size: Tokens or rows of the pass.
        """
        own = self._observed.get(_learning_size(size))
        return own.num_observations if own is not None else 0

    def as_dict(self) -> dict[str, float]:
        """Seconds by size, for reports."""
        sizes = sorted({*self._first.sizes, *self._observed})
        return {str(size): self.seconds(size) for size in sizes}

    def _fit(self) -> _Line:
        sizes = sorted(self._observed)
        owns = [self._observed[size] for size in sizes]
        values = _in_order([own.estimate for own in owns], [self._weight(own) for own in owns])
        known = list(zip(sizes, values, strict=True))
        estimates = self._remaining_first_estimates(_Line(known))
        return _Line(sorted([*known, *estimates]))

    def _estimate(self, size: int, own: _Observed) -> float:
        values = sorted(own.seconds)
        if len(values) == 1 and self._first.covers(size):
            return min(values[0], self._first.seconds(size))
        return values[(len(values) - 1) // 2]

    def _doubt_others(self, own: _Observed, estimate: float) -> None:
        """Makes first estimates of what other sizes took while one took more than it does now: a part of that.

        Where that one is faster than ever, so may be those that ran meanwhile. Otherwise the machine is as it was before, and
        nothing is faster than it was ever seen or measured; all are as fast as that where that one is, too.
        """
        for size, other in self._observed.items():
            doubted = other.estimate * estimate / own.estimate
            if estimate >= FASTER * own.best:
                measured = self._first.seconds(size) if self._first.covers(size) else math.inf
                doubted = max(doubted, min(other.best, measured))
                if FASTER * estimate <= own.best:
                    doubted = min(doubted, other.best)
            elif not other.was_learnt_since(own.level_before_since):
                continue
            if other is not own and doubted < other.estimate:
                other.doubt(doubted, self._num_observed)
        self._line = None

    def _weight(self, own: _Observed) -> float:
        return len(own.seconds) / (1.0 + (self._num_observed - own.numbers[-1]) / FRESH)

    def _remaining_first_estimates(self, known: _Line) -> list[tuple[int, float]]:
        """First estimates of sizes that have not run, corrected by those that have.

        An estimate that is too low corrects itself, because the size will run; one that is too high might keep it from ever
        running. So estimates go down with the nearest size that was overestimated along with them, and never up.
        """
        estimates: list[tuple[int, float]] = []
        if self._first.sizes and all(size in self._observed for size in self._first.sizes):
            return estimates
        compared = [size for size in known.sizes if self._first.covers(size)]
        for size, estimate in zip(self._first.sizes, self._first.values, strict=True):
            if size in self._observed:
                continue
            if compared:
                nearest = min(compared, key=lambda other: abs(math.log(other / size)))
                estimate *= min(1.0, known.seconds(nearest) / self._first.seconds(nearest))
            estimates.append((size, known.between(size, estimate)))
        return estimates


class _Observed:
    """What was observed of one size.

    Attributes:
        seconds: The newest observations. One that became doubtful is no longer what was observed.
        numbers: Their numbers among the observations of all sizes.
        estimate: Their low median; as long as there is one alone, the first estimate if that is less.
        best: The least estimate that stood on enough observations.
        level_before_since: Number of its first observation after the last change of its cost but one.
    """

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=WINDOW)
        self.numbers: deque[int] = deque(maxlen=WINDOW)
        self.estimate = 0.0
        self.best = math.inf
        self.level_before_since = 0
        self._level_since = 0
        self._doubted_at = self._num_doubtful = 0
        self._num_faster = self._num_slower = 0

    @property
    def num_observations(self) -> int:
        """Observations, those included that a doubtful one stands for; at most `WINDOW`."""
        return min(WINDOW, len(self.seconds) + self._num_doubtful)

    def take_in(self, seconds: float, number: int) -> bool:
        """Adds an observation. Returns whether a row of them has replaced all before it."""
        self.seconds.append(seconds)
        self.numbers.append(number)
        self._level_since = self._level_since or number
        while len(self.seconds) > ENOUGH and self.numbers[0] < number - OLD:
            self.forget_all_but(len(self.seconds) - 1)
        self._num_faster = self._num_faster + 1 if seconds < FASTER * self.estimate else 0
        self._num_slower = self._num_slower + 1 if seconds > SLOWER * self.estimate else 0
        if self._num_faster < FASTER_IN_A_ROW and self._num_slower < SLOWER_IN_A_ROW:
            return False
        self.forget_all_but(max(self._num_faster, self._num_slower))
        self.level_before_since, self._level_since = self._level_since, self.numbers[0]
        return True

    def was_learnt_since(self, number: int) -> bool:
        """Whether the estimate stands on what ran since an observation, and on no doubt."""
        return self.numbers[(len(self.numbers) - 1) // 2] >= max(number, self._doubted_at + 1)

    def doubt(self, estimate: float, number: int) -> None:
        """Puts a first estimate in place of all that was observed.

        Args:
            estimate: The estimate.
            number: Of the newest observation of any size.
        """
        known = self.num_observations
        self.forget_all_but(1)
        self.seconds[0] = self.estimate = estimate
        self._doubted_at, self._num_doubtful = number, known - 1
        self._num_faster = self._num_slower = 0

    def forget_all_but(self, newest: int) -> None:
        while len(self.seconds) > newest:
            self.seconds.popleft()
            self.numbers.popleft()
            # A doubtful one is the oldest.
            self._num_doubtful = 0


class _Line:
    """Straight lines through points that rise; a point above one to its right counts as low as that.

    Args:
        points: Sizes and seconds, by ascending size.
    """

    def __init__(self, points: Iterable[tuple[int, float]]) -> None:
        self.sizes: list[int] = []
        self.values: list[float] = []
        for size, value in points:
            self.sizes.append(size)
            self.values.append(value)
        for index in range(len(self.values) - 1, 0, -1):
            self.values[index - 1] = min(self.values[index - 1], self.values[index])

    def covers(self, size: int) -> bool:
        return bool(self.sizes) and self.sizes[0] <= size <= self.sizes[-1]

    def seconds(self, size: int) -> float:
        if size <= self.sizes[0]:
            return self.values[0]
        if size >= self.sizes[-1]:
            return self.values[-1] * (size / self.sizes[-1])
        right = bisect_left(self.sizes, size)
        if self.sizes[right] == size:
            return self.values[right]
        left = right - 1
        part = (size - self.sizes[left]) / (self.sizes[right] - self.sizes[left])
        value = self.values[left] + part * (self.values[right] - self.values[left])
        return min(value, self.values[right])

    def between(self, size: int, value: float) -> float:
        """A value for a size, made to lie between those of its neighbours."""
        index = bisect_right(self.sizes, size)
        if index < len(self.sizes):
            value = min(value, self.values[index])
        return max(value, self.values[index - 1]) if index > 0 else value


def _in_order(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The rising values nearest to given ones by weighted absolute error (pool adjacent violators).

    A mean would follow the one value of a pool that is far off; the median leaves it alone.

    Args:
        values: The values.
        weights: Weight of each, above 0.

    Returns:
        As many values, none below the one before it.
    """
    pools: list[tuple[float, list[tuple[float, float]]]] = []
    for entry in zip(values, weights, strict=True):
        value, members = entry[0], [entry]
        while pools and pools[-1][0] > value:
            members = sorted(pools.pop()[1] + members)
            value = _weighted_median(members)
        pools.append((value, members))
    return [value for value, members in pools for _ in members]


def _weighted_median(members: Sequence[tuple[float, float]]) -> float:
    """The low median of ascending values with weights."""
    left = sum(weight for _, weight in members) / 2.0
    for value, weight in members:
        left -= weight
        if left <= 0.0:
            return value
    return members[-1][0]


def _learning_size(size: int) -> int:
    """The size that a pass counts as: itself, or the largest of the few that learn together."""
    if size <= EXACT_SIZES:
        return size
    step = (1 << (size - 1).bit_length() - 1) // SIZES_PER_DOUBLING
    return -(-size // step) * step


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

    @classmethod
    def from_report(cls, report: Mapping[str, Mapping[str, float]]) -> StepCosts:
        """Reads what `as_dict` wrote; its keys are numbers as text.

        Args:
            report: ``draft_seconds`` and ``target_seconds``.

        Returns:
            The costs.
        """
        draft, target = (
            {int(size): float(seconds) for size, seconds in report[name].items()}
            for name in ("draft_seconds", "target_seconds")
        )
        return cls(draft, target)

    def draft_cost(self, batch: int) -> float:
        """A draft step of `batch` rows over a dense step of the target."""
        return self.draft.seconds(batch) / self.target.seconds(batch)

    def verify_cost(self, batch: int, kernel_size: int) -> float:
        """A verification pass over a dense step of the target, both for `batch` requests."""
        return self.target.seconds(batch * kernel_size) / self.target.seconds(batch)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Both curves, for reports."""
        return {"draft_seconds": self.draft.as_dict(), "target_seconds": self.target.as_dict()}
