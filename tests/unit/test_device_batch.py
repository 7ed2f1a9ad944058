"""The draft loop as tensors against the loop in plain Python, on a toy model and random batches."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from vllm_sirius.drafting.device_batch import MAX_END_TOKENS, NO_REQUEST, DraftBatch, DraftTable
from vllm_sirius.drafting.loop import DraftRequest, draft_tokens
from vllm_sirius.pacing.policy import FullLength
from vllm_sirius.request_rules import RequestRules

VOCABULARY = 11
"""Small, so that random end tokens are met."""
MAX_MODEL_LEN = 40
DRAFT_LENGTH = 6
NUM_SLOTS = 9
MAX_ROWS = 8
STALE = 77
"""Stands in every buffer before a step, as a batch before it would have left something."""


@dataclass
class Request:
    slot: int
    position: int
    last_token: int
    prompt_len: int
    max_tokens: int
    ends: tuple[int, ...]
    enabled: bool
    emitted: bool

    @property
    def rules(self) -> RequestRules:
        return RequestRules(self.enabled, 0.1, frozenset(self.ends), self.prompt_len, self.max_tokens, 0)

    @property
    def max_draft_tokens(self) -> int:
        return self.rules.most_draft_tokens(self.position + 1, DRAFT_LENGTH, MAX_MODEL_LEN) if self.emitted else 0


def random_requests(random_numbers, count):
    requests = []
    for slot in random_numbers.sample(range(NUM_SLOTS), count):
        position = random_numbers.randrange(MAX_MODEL_LEN)
        prompt_len = random_numbers.randrange(1, position + 2)
        # Up to a few tokens, or none at all, may still be emitted.
        max_tokens = position + 1 - prompt_len + random_numbers.randrange(1, 2 * DRAFT_LENGTH)
        ends = tuple(random_numbers.sample(range(VOCABULARY), random_numbers.randrange(3)))
        flags = [random_numbers.random() < 0.85 for _ in range(2)]
        last_token = random_numbers.randrange(VOCABULARY)
        requests.append(Request(slot, position, last_token, prompt_len, max_tokens, ends, *flags))
    return requests


def toy_next_token(token_ids, positions):
    return (token_ids.long() * 7 + positions * 5 + 3) % VOCABULARY


def toy_forward(fed):
    def forward(rows, counts, token_ids, positions):
        assert counts == [1] * len(rows)
        fed.append(
            {row: (int(t), int(p)) for row, t, p in zip(rows, token_ids.tolist(), positions.tolist(), strict=True)}
        )
        return torch.nn.functional.one_hot(toy_next_token(token_ids, positions), VOCABULARY).float()

    return forward


def make_table():
    table = DraftTable(NUM_SLOTS, torch.device("cpu"))
    table.num_drafted.fill_(STALE)
    return table


class Device:
    """The tensor loop with its buffers, which are the same for every batch."""

    def __init__(self):
        self.table = make_table()
        self.input_ids = torch.full((MAX_ROWS,), STALE, dtype=torch.int32)
        self.positions = torch.full((MAX_ROWS,), STALE)
        self.seq_lens = torch.full((MAX_ROWS,), STALE, dtype=torch.int32)
        self.idx_mapping = torch.full((MAX_ROWS,), STALE)
        self.drafts = torch.full((MAX_ROWS, DRAFT_LENGTH), STALE)
        self.batch = DraftBatch(
            self.table,
            self.input_ids,
            self.positions,
            self.seq_lens,
            self.idx_mapping,
            self.drafts,
            SimpleNamespace(max_model_len=MAX_MODEL_LEN),
        )

    def draft(self, requests, num_rows=None):
        """Runs all steps; `num_rows` more than requests fill a graph up. Returns what the rows with a request were fed."""
        count = len(requests)
        num_rows = num_rows or count
        last_sampled = torch.full((NUM_SLOTS, 1), STALE)
        for request in requests:
            longest = min(request.prompt_len + request.max_tokens, MAX_MODEL_LEN)
            self.table.admit(request.slot, longest - 2 if request.enabled else -1, request.ends, threshold=0.1)
            self.table.num_drafted[request.slot] = STALE
            last_sampled[request.slot] = request.last_token
        self.idx_mapping.fill_(NO_REQUEST)
        self.idx_mapping[:count] = torch.tensor([request.slot for request in requests])
        positions = torch.tensor([request.position for request in requests])
        emitted = torch.tensor([request.emitted for request in requests])
        self.batch.begin(count, positions, last_sampled, emitted)
        fed = []
        for _ in range(DRAFT_LENGTH):
            self.check_buffers(count)
            rows = (self.idx_mapping[:num_rows] != NO_REQUEST).nonzero().flatten().tolist()
            fed.append({row: (int(self.input_ids[row]), int(self.positions[row])) for row in rows})
            self.batch.advance(num_rows, toy_next_token(self.input_ids, self.positions)[:num_rows])
        return [step for step in fed if step]

    def check_buffers(self, count):
        """No row may look past the longest text, and a row that drafts attends to all before it and to itself."""
        assert bool((self.positions[:count] < MAX_MODEL_LEN).all())
        drafts = self.idx_mapping[:count] != NO_REQUEST
        assert torch.equal(self.seq_lens[:count][drafts].long(), self.positions[:count][drafts] + 1)
        assert bool((self.seq_lens[:count][~drafts] == 1).all())
        assert not self.seq_lens[count:].any()


def plain_drafts(requests):
    fed = []
    rows = [
        DraftRequest(row, r.last_token, r.position, r.max_draft_tokens, frozenset(r.ends))
        for row, r in enumerate(requests)
        if r.max_draft_tokens > 0
    ]
    return draft_tokens(rows, toy_forward(fed), FullLength()), fed


@pytest.mark.parametrize("seed", range(40))
def test_random_batches_draft_as_the_plain_loop(seed):
    random_numbers = random.Random(seed)
    device = Device()
    for _ in range(3):  # the buffers of the batch before are stale
        requests = random_requests(random_numbers, random_numbers.randrange(1, MAX_ROWS + 1))
        expected, expected_feed = plain_drafts(requests)
        others = {slot: int(device.table.num_drafted[slot]) for slot in range(NUM_SLOTS)}
        fed = device.draft(requests, num_rows=random_numbers.randrange(len(requests), MAX_ROWS + 1))
        assert fed == expected_feed
        for row, request in enumerate(requests):
            tokens = expected.get(row, [])
            padding = [0] * (DRAFT_LENGTH - len(tokens))
            assert device.drafts[row].tolist() == tokens + padding
            assert int(device.table.num_drafted[request.slot]) == len(tokens)
            del others[request.slot]
        for slot, length in others.items():  # of requests that are not in the batch
            assert int(device.table.num_drafted[slot]) == length


def test_the_random_batches_meet_every_reason_to_stop():
    seen = set()
    for seed in range(40):
        for request in random_requests(random.Random(seed), MAX_ROWS):
            drafts, _ = plain_drafts([request])
            length = len(drafts.get(0, []))
            seen.add("off" if not request.enabled else "prefill" if not request.emitted else "runs")
            if 0 < length < request.max_draft_tokens:
                seen.add("end token")
            if length == DRAFT_LENGTH:
                seen.add("whole")
            if 0 < request.max_draft_tokens == MAX_MODEL_LEN - 2 - request.position < DRAFT_LENGTH:
                seen.add("longest text")
            if 0 < request.max_draft_tokens < min(DRAFT_LENGTH, MAX_MODEL_LEN - 2 - request.position):
                seen.add("max_tokens")
    assert seen == {"off", "prefill", "runs", "end token", "whole", "longest text", "max_tokens"}


def request(**changes):
    whole = {"slot": 3, "position": 4, "last_token": 1, "prompt_len": 2, "max_tokens": 30, "ends": ()}
    return Request(**{**whole, "enabled": True, "emitted": True, **changes})


def test_padding_rows_leave_slot_zero_alone():
    device = Device()
    device.draft([request(slot=0), request(slot=5)], num_rows=MAX_ROWS)
    assert device.table.num_drafted[[0, 5]].tolist() == [DRAFT_LENGTH, DRAFT_LENGTH]
    device.draft([request(slot=5)], num_rows=MAX_ROWS)
    assert int(device.table.num_drafted[0]) == DRAFT_LENGTH


def test_a_dummy_batch_drafts_nothing_and_leaves_slot_zero_alone():
    """Rows without a request, as in warm-up runs, between two batches of a real one."""
    device = Device()
    device.draft([request(slot=0)])
    device.idx_mapping.fill_(NO_REQUEST)
    last_sampled, emitted = torch.full((NUM_SLOTS, 1), 1), torch.ones(4, dtype=torch.bool)
    device.batch.begin(4, torch.full((4,), 7), last_sampled, emitted)
    for _ in range(DRAFT_LENGTH):
        device.check_buffers(4)
        device.batch.advance(4, toy_next_token(device.input_ids, device.positions)[:4])
    assert bool((device.idx_mapping == NO_REQUEST).all())
    assert not device.drafts[:4].any()
    assert int(device.table.num_drafted[0]) == DRAFT_LENGTH


def test_a_shorter_batch_leaves_no_row_of_the_longer_one_before():
    device = Device()
    device.draft([request(slot=slot) for slot in range(MAX_ROWS)])
    fed = device.draft([request(slot=8)], num_rows=MAX_ROWS)
    assert all(list(step) == [0] for step in fed)


def test_more_end_tokens_than_the_table_holds_switch_drafting_off():
    device = Device()
    most = tuple(range(VOCABULARY, VOCABULARY + MAX_END_TOKENS))
    device.draft([request(ends=most), request(slot=4, ends=(*most, 999))])
    assert device.table.num_drafted[[3, 4]].tolist() == [DRAFT_LENGTH, 0]


def test_a_new_owner_of_a_slot_inherits_no_end_tokens():
    device = Device()
    first = int(toy_next_token(torch.tensor(1), torch.tensor(4)))
    device.draft([request(ends=(first,))])
    assert int(device.table.num_drafted[3]) == 0
    device.draft([request(ends=())])
    assert int(device.table.num_drafted[3]) == DRAFT_LENGTH


def test_fewer_steps_than_the_longest_draft_are_counted():
    device = Device()
    device.table.admit(3, 30, (), threshold=0.1)
    device.idx_mapping[0] = 3
    device.batch.begin(1, torch.tensor([4]), torch.full((NUM_SLOTS, 1), 1), torch.tensor([True]))
    for _ in range(2):
        device.batch.advance(1, toy_next_token(device.input_ids, device.positions)[:1])
    assert int(device.table.num_drafted[3]) == 2
    assert device.drafts[0, 2:].tolist() == [0] * (DRAFT_LENGTH - 2)


def test_the_buffers_keep_their_addresses():
    device = Device()
    tensors = (device.input_ids, device.positions, device.seq_lens, device.idx_mapping, device.drafts)
    tables = (device.table.last_position, device.table.end_token_ids, device.table.num_drafted, device.batch.step)
    before = [tensor.data_ptr() for tensor in (*tensors, *tables)]
    device.draft([request(), request(slot=1)])
    assert [tensor.data_ptr() for tensor in (*tensors, *tables)] == before
    assert device.batch.draft_token_ids is device.drafts
