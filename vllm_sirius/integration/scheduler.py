"""Schedulers that choose the draft length of every batch. Subclass those of ``vllm.v1.core.sched``; Model Runner V2 only.

Upstream looks the length up by batch size in a fixed table. Here the table is alive: it answers by what steps took and what
they accepted, both of which a scheduler sees anyway, so that nothing waits for the device.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_sirius.pacing.batch_length import BatchLength

if TYPE_CHECKING:
    # The mixin's methods call those of the scheduler it is mixed into.
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
else:
    _Base = object


class LiveLookup:
    """Stands where upstream has a list of draft lengths by batch size.

    Args:
        lengths: What chooses them.
    """

    def __init__(self, lengths: BatchLength) -> None:
        self._lengths = lengths

    def __getitem__(self, num_rows: int) -> int:
        return self._lengths.choose(num_rows)


class AdaptiveLengths(_Base):
    """Measures steps and feeds `BatchLength`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        speculative: Any = self.vllm_config.speculative_config
        self.draft_lengths = BatchLength(speculative.adaptive_lengths)
        lookup: Any = LiveLookup(self.draft_lengths)
        self.dynamic_sd_lookup = lookup
        self._started: deque[tuple[Any, float]] = deque()
        self._last_update = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; remembers when."""
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens > 0:
            self._started.append((output, time.perf_counter()))
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As upstream; takes in the step's verdicts and duration first.

        Args:
            scheduler_output: The step.
            model_runner_output: What came of it.
        """
        if scheduler_output.total_num_scheduled_tokens > 0:
            now = time.perf_counter()
            # Steps of an async engine overlap: one begins when the one before it ends.
            seconds = now - max(self._start_of(scheduler_output), self._last_update)
            self._last_update = now
            self._observe(scheduler_output, model_runner_output, seconds)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _start_of(self, scheduler_output: Any) -> float:
        while self._started:
            output, started = self._started.popleft()
            if output is scheduler_output:
                return started
        return 0.0

    def _observe(self, scheduler_output: Any, model_runner_output: Any, seconds: float) -> None:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        counts = scheduler_output.num_scheduled_tokens
        length = scheduler_output.num_spec_tokens_to_schedule
        sampled, places = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        verdicts = []
        # Prefill is no decode step, and a step between two lengths is of neither.
        steady = not scheduler_output.scheduled_new_reqs
        for request, count in counts.items():
            num_drafted = len(drafts.get(request, ()))
            steady = steady and num_drafted == length and count == 1 + num_drafted
            # An aborted request may be gone from the output.
            place = places.get(request)
            num_sampled = len(sampled[place]) if sampled and place is not None else 0
            if num_drafted and num_sampled:
                verdicts.append((num_drafted, num_sampled - 1))
        self.draft_lengths.observe_verdicts(verdicts)
        if steady and seconds > 0.0:
            self.draft_lengths.observe_step(len(counts), length, seconds)


class SiriusScheduler(AdaptiveLengths, Scheduler):
    """vLLM's scheduler with adaptive draft lengths."""


class SiriusAsyncScheduler(AdaptiveLengths, AsyncScheduler):
    """vLLM's async scheduler with adaptive draft lengths."""
