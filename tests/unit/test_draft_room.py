"""No draft leaves the blocks of its request, by what the host knows of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_sirius.config import SiriusConfig
from vllm_sirius.drafting.device_batch import DraftTable
from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.integration.draft_room import check_room
from vllm_sirius.integration.runner_v2.request_state import SiriusRequestState

BLOCK = 16
LONGEST = 64


def test_the_last_token_of_the_last_block_has_room():
    check_room(np.array([0, 2 * BLOCK - 1]), np.array([1, 2]), BLOCK)


@pytest.mark.parametrize("position", [2 * BLOCK, 5 * BLOCK])
def test_a_position_behind_the_last_block_is_named(position):
    with pytest.raises(
        SiriusIntegrationError, match=rf"position {position}, .* blocks for {2 * BLOCK} tokens.*max-model-len"
    ):
        check_room(np.array([3, position]), np.array([1, 2]), BLOCK)


class Runner:
    """What the check reads of Model Runner V2: two requests in slots 2 and 0 of a batch whose texts may grow to `lengths`."""

    def __init__(self, lengths, num_blocks, max_tokens=1000):
        self.longest = SimpleNamespace(max_model_len=LONGEST)
        table = DraftTable(4, torch.device("cpu"))
        self.state = SiriusRequestState(SiriusConfig(), table, None, self.longest)
        self.max_tokens = max_tokens
        self.batch = SimpleNamespace(
            idx_mapping_np=np.array([2, 0]), seq_lens_cpu_upper_bound=torch.tensor([*lengths, 0], dtype=torch.int32)
        )
        blocks = np.zeros((2, 4), dtype=np.int32)
        blocks[:, [2, 0]] = num_blocks
        self.tables = SimpleNamespace(block_sizes=[BLOCK, BLOCK], num_blocks=SimpleNamespace(np=blocks))

    def admit(self, **sampling):
        for slot in (0, 2):
            parameters = SimpleNamespace(
                extra_args=sampling.get("extra_args"),
                stop_token_ids=[],
                eos_token_id=None,
                max_tokens=self.max_tokens,
                min_tokens=0,
            )
            self.state.add_request(
                slot, SimpleNamespace(sampling_params=parameters, prompt_len=5, num_computed_tokens=0)
            )

    def check(self, num_steps=7):
        self.state.check_room(self.batch, num_steps, self.tables)


def test_reserved_slots_are_room_enough():
    runner = Runner(lengths=[9, 25], num_blocks=[1, 2])
    runner.admit()
    runner.check()


@pytest.mark.parametrize("lengths", [[10, 25], [9, 26]], ids=["first row", "second row"])
def test_one_position_more_is_refused(lengths):
    runner = Runner(lengths, num_blocks=[1, 2])
    runner.admit()
    with pytest.raises(SiriusIntegrationError, match="K/V at position"):
        runner.check()


def test_every_kv_cache_group_must_have_room():
    runner = Runner(lengths=[9, 25], num_blocks=[[1, 2], [1, 1]])
    runner.admit()
    with pytest.raises(SiriusIntegrationError, match=f"blocks for {BLOCK} tokens"):
        runner.check()


def test_drafts_end_before_a_limit_that_shrank_after_the_start():
    """A block less than the text was to fill at first; the limit of a request is read when it comes."""
    runner = Runner(lengths=[40, 42], num_blocks=[3, 3])
    runner.admit()
    with pytest.raises(SiriusIntegrationError, match=f"position {40 + 15 - 1}"):
        runner.check(num_steps=15)
    runner.longest.max_model_len = 3 * BLOCK
    runner.admit()
    runner.check(num_steps=15)
    assert runner.state.table.last_position[[0, 2]].tolist() == [3 * BLOCK - 2] * 2


def test_requests_that_do_not_draft_need_no_room():
    runner = Runner(lengths=[16, 32], num_blocks=[1, 2])
    runner.admit(extra_args={"sirius": "off"})
    runner.check()
