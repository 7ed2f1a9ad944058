"""The state of Sirius on Model Runner V2: upstream's requests and batches in terms of slots, tables and rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_sirius.config import SiriusConfig
from vllm_sirius.drafting.device_batch import DraftTable, LongestText
from vllm_sirius.integration.draft_room import check_room
from vllm_sirius.request_rules import RequestRules
from vllm_sirius.sparsity.observation import ObservedRows
from vllm_sirius.sparsity.statistics import NeuronStatistics


class SiriusRequestState:
    """Follows upstream's requests and tells the statistics what each forward pass holds.

    Slots are upstream's: the index of a request in `RequestState`, which it keeps until it ends or is preempted.

    Args:
        config: The options.
        table: What drafts must know of each request.
        statistics: Neuron statistics of the requests, or ``None`` with fine sparsity.
        longest: Knows the longest text, which vLLM may fit to the KV cache after this was built.
    """

    def __init__(
        self,
        config: SiriusConfig,
        table: DraftTable,
        statistics: NeuronStatistics | None,
        longest: LongestText,
    ) -> None:
        self.table = table
        # What the table has on the device, to be read without waiting for it.
        self._last_position = np.full(len(table.last_position), -1, dtype=np.int64)
        self._config = config
        self._statistics = statistics
        self._longest = longest

    def add_request(self, slot: int, new_request: Any) -> None:
        """Admits a request, or one that was preempted and comes back with its text as its prompt.

        Args:
            slot: Its index in upstream's tables.
            new_request: Upstream's `NewRequestData`.
        """
        if self._statistics is not None:
            self._statistics.reset(slot, new_request.num_computed_tokens)
        rules = RequestRules.read(new_request.sampling_params, new_request.prompt_len, self._config)
        self._last_position[slot] = rules.last_position(self._longest.max_model_len)
        self.table.admit(slot, int(self._last_position[slot]), rules.end_token_ids, rules.threshold)

    def check_room(self, input_batch: Any, num_steps: int, block_tables: Any) -> None:
        """Refuses drafts that could leave the blocks of their request, by what is known without asking the device.

        Args:
            input_batch: Upstream's `InputBatch`.
            num_steps: Tokens of the coming drafts.
            block_tables: Upstream's `BlockTables`.

        Raises:
            SiriusIntegrationError: As in `draft_room`.
        """
        slots = input_batch.idx_mapping_np
        # Were every drafted token accepted, the text would end here; the draft after it starts at this position.
        starts = np.asarray(input_batch.seq_lens_cpu_upper_bound)[: len(slots)].astype(np.int64)
        # A token is fed, and its K/V written, where the one after it may still stand.
        highest = np.minimum(starts + num_steps - 1, self._last_position[slots] - 1)
        for block_size, num_blocks in zip(block_tables.block_sizes, block_tables.num_blocks.np, strict=True):
            check_room(highest, num_blocks[slots], block_size)

    def begin_pass(self, input_batch: Any) -> None:
        """Announces the rows of a real forward pass.

        Args:
            input_batch: Upstream's `InputBatch`.
        """
        if self._statistics is None:
            return
        runs = []
        for row in range(input_batch.num_reqs):
            count = int(input_batch.num_scheduled_tokens[row])
            prefill = bool(input_batch.is_prefilling_np[row])
            if not prefill and not self._config.refresh:
                continue
            if prefill:
                left = input_batch.prefill_len_np[row] - input_batch.num_computed_prefill_tokens_np[row]
                count = min(count, int(left))
            start = int(input_batch.query_start_loc_np[row])
            runs.append(ObservedRows(int(input_batch.idx_mapping_np[row]), start, count, pending=not prefill))
        self._statistics.begin_step(runs)

    def begin_dummy_pass(self) -> None:
        """Announces a pass whose rows belong to nobody, so that it leaves no trace in what real requests learned."""
        if self._statistics is not None:
            self._statistics.begin_step([])

    def end_pass(self, input_batch: Any, num_sampled: torch.Tensor) -> None:
        """Takes in what the target accepted.

        Args:
            input_batch: Upstream's `InputBatch`.
            num_sampled: Tokens that each row emitted, ``int32 [num_reqs]``, on the device; 0 for a row in prefill.
        """
        if self._statistics is None:
            return
        self._statistics.end_step()
        self._statistics.commit(input_batch.idx_mapping[: input_batch.num_reqs].long(), num_sampled)
        for row in range(input_batch.num_reqs):
            known = input_batch.num_computed_prefill_tokens_np[row] + input_batch.num_scheduled_tokens[row]
            if input_batch.is_prefilling_np[row] and known >= input_batch.prefill_len_np[row]:
                self._statistics.learn_prior(int(input_batch.idx_mapping_np[row]))
