"""The flocking statistic: GRIFFIN's on prompts, the refresh on accepted rows only, slots and prior."""

import math

import pytest
import torch

from vllm_sirius.sparsity.coarse import CoarseSelection, num_kept_neurons
from vllm_sirius.sparsity.fine import fine_mask
from vllm_sirius.sparsity.observation import IGNORED, ObservationPlan, ObservedRows
from vllm_sirius.sparsity.statistics import PRIOR_DECAY, PRIOR_TOKENS, REFRESH_DECAY, NeuronStatistics

CPU = torch.device("cpu")


def table(sizes=(3,), slots=2, pending=8, decay=1.0) -> NeuronStatistics:
    return NeuronStatistics(sizes, slots, pending, CPU, decay)


def prefill(statistics, slot, activation, start=0, layer=0):
    statistics.begin_step([ObservedRows(slot, start, len(activation), pending=False)])
    statistics.observe(layer, activation)
    statistics.end_step()


def commit(statistics, emitted):
    statistics.commit(torch.tensor(list(emitted)), torch.tensor(list(emitted.values())))


def scores(statistics, *slots):
    return statistics.scores(torch.tensor(slots, dtype=torch.int64))


def test_prompt_statistic_is_the_square_of_griffins():
    statistics = table()
    slot = statistics.acquire()
    activation = torch.tensor([[3.0, 4.0, 0.0], [0.0, -1.0, 0.0]])
    prefill(statistics, slot, activation)
    # Rows normalised: (.6, .8, 0) and (0, -1, 0); sums of squares over tokens: .36, 1.64, 0.
    torch.testing.assert_close(statistics.energy[slot], torch.tensor([0.36, 1.64, 0.0]))
    griffin = (activation / activation.norm(dim=1, keepdim=True)).norm(dim=0)
    torch.testing.assert_close(statistics.energy[slot].sqrt(), griffin)


def test_chunks_of_a_prompt_add_up_to_the_whole():
    activation = torch.randn(7, 3)
    whole, chunked = table(), table()
    prefill(whole, whole.acquire(), activation)
    slot = chunked.acquire()
    for chunk in activation.split(3):
        prefill(chunked, slot, chunk)
    torch.testing.assert_close(whole.energy, chunked.energy)


def test_recent_prompt_tokens_weigh_more_where_the_set_is_refreshed():
    statistics = NeuronStatistics((3,), 1, 0, CPU)
    slot = statistics.acquire()
    for chunk in (torch.eye(3)[[0, 1]], torch.eye(3)[[2]]):
        prefill(statistics, slot, chunk)
    expected = torch.tensor([REFRESH_DECAY**2, REFRESH_DECAY, 1.0])
    torch.testing.assert_close(statistics.energy[slot], expected)
    torch.testing.assert_close(scores(statistics, slot), expected / expected.sum())


def test_rows_of_other_requests_and_padding_leave_no_trace():
    statistics = table()
    first, second = statistics.acquire(), statistics.acquire()
    activation = torch.eye(3)[[0, 1, 1, 2]]
    statistics.begin_step([ObservedRows(first, 0, 1, False), ObservedRows(second, 1, 2, False)])
    statistics.observe(0, activation)
    statistics.end_step()
    assert statistics.energy[first].tolist() == [1, 0, 0]
    assert statistics.energy[second].tolist() == [0, 2, 0]
    statistics.observe(0, activation)
    assert statistics.energy.sum() == 3


def test_a_correction_pass_counts_its_accepted_rows_with_decay():
    statistics = table(decay=0.5)
    slot = statistics.acquire()
    prefill(statistics, slot, torch.eye(3)[[0]])
    statistics.begin_step([ObservedRows(slot, 2, 3, pending=True)])
    statistics.observe(0, torch.eye(3)[[1, 1, 0, 1, 2]])
    statistics.end_step()
    assert statistics.energy[slot].tolist() == [1, 0, 0]  # nothing counts before the verdict
    commit(statistics, {slot: 2})
    expected = [0.25 + 0.5, 1.0, 0.0]  # prompt faded by two tokens, rows 2 (neuron 0) and 3 (neuron 1)
    torch.testing.assert_close(statistics.energy[slot], torch.tensor(expected))
    commit(statistics, {slot: 2})  # a second verdict on the same pass has nothing to add
    torch.testing.assert_close(statistics.energy[slot], torch.tensor(expected))


def test_layers_do_not_mix():
    statistics = NeuronStatistics((2, 3), 1, 4, CPU)
    slot = statistics.acquire()
    statistics.begin_step([ObservedRows(slot, 0, 1, False)])
    statistics.observe(0, torch.tensor([[0.0, 2.0]]))
    statistics.observe(1, torch.tensor([[0.0, 0.0, 5.0]]))
    assert statistics.energy[slot].tolist() == [0, 1, 0, 0, 1]


def test_long_prompts_do_not_drown_short_ones():
    statistics = table()
    long, short = statistics.acquire(), statistics.acquire()
    prefill(statistics, long, torch.eye(3)[[0] * 100])
    prefill(statistics, short, torch.eye(3)[[1]])
    torch.testing.assert_close(scores(statistics, long, short), torch.tensor([1.0, 1.0, 0.0]))


def test_a_cached_prompt_starts_from_what_other_prompts_taught():
    statistics = table()
    slot = statistics.acquire()
    prefill(statistics, slot, torch.eye(3)[[2, 2, 2]])
    statistics.learn_prior(slot)
    expected = torch.full((3,), 1 / 3) * PRIOR_DECAY + torch.tensor([0, 0, 1 - PRIOR_DECAY])
    torch.testing.assert_close(statistics.prior, expected)
    cached = statistics.acquire(cached_tokens=1000)
    torch.testing.assert_close(statistics.energy[cached], expected * PRIOR_TOKENS)
    torch.testing.assert_close(scores(statistics, cached), expected)


def test_without_any_knowledge_the_prior_decides():
    statistics = table()
    assert torch.equal(scores(statistics), statistics.prior)
    assert torch.equal(scores(statistics, statistics.acquire()), statistics.prior)


def test_slots_are_bounded_reused_and_clean():
    statistics = table(slots=2)
    first, second = statistics.acquire(), statistics.acquire()
    assert {first, second} == {0, 1}
    assert statistics.acquire() is None
    prefill(statistics, first, torch.randn(4, 3))
    statistics.release(first)
    assert statistics.acquire() == first
    assert statistics.energy[first].count_nonzero() == 0


def test_more_correction_rows_than_the_table_holds_skip_a_refresh():
    statistics = table(pending=4)
    first, second = statistics.acquire(), statistics.acquire()
    statistics.begin_step([ObservedRows(first, 0, 3, True), ObservedRows(second, 3, 3, True)])
    statistics.observe(0, torch.eye(3)[[0, 0, 0, 1, 1, 1]])
    commit(statistics, {first: 3, second: 3})
    assert statistics.energy[first].count_nonzero() == 1
    assert statistics.energy[second].count_nonzero() == 0


def test_ragged_verdicts_on_one_pass_and_rows_without_a_request():
    statistics = table(slots=3, decay=0.5)
    first, second = statistics.acquire(), statistics.acquire()
    statistics.begin_step([ObservedRows(first, 0, 2, True), ObservedRows(second, 2, 3, True)])
    statistics.observe(0, torch.eye(3)[[0, 1, 2, 2, 0]])
    statistics.commit(torch.tensor([second, statistics.nobody, first]), torch.tensor([3, 5, 1]))
    torch.testing.assert_close(statistics.energy[first], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(statistics.energy[second], torch.tensor([1.0, 0.0, 0.75]))
    assert statistics.tables[statistics.nobody].count_nonzero() == 0
    nobody = statistics.nobody
    torch.testing.assert_close(scores(statistics, first, nobody), torch.tensor([1.0, 0.0, 0.0]))


def test_the_plan_on_the_device_forgets_the_rows_of_the_last_pass():
    plan = ObservationPlan(8, CPU)
    plan.set([(ObservedRows(1, 1, 2, False), torch.tensor([0.5, 1.0]))], [ObservedRows(0, 4, 2, True)])
    assert plan.num_rows == 6
    assert plan.token_slot.tolist() == [IGNORED, 1, 1, *[IGNORED] * 5]
    assert plan.token_weight.tolist() == [0, 0.5, 1, 0, 0, 0, 0, 0]
    assert plan.token_pending.tolist() == [*[IGNORED] * 4, 0, 1, IGNORED, IGNORED]
    plan.set([(ObservedRows(2, 0, 1, False), torch.tensor([1.0]))], [])
    assert plan.token_slot.tolist() == [2, *[IGNORED] * 7]
    assert plan.token_pending.tolist() == [IGNORED] * 8


def test_zero_activation_is_harmless():
    statistics = table()
    slot = statistics.acquire()
    prefill(statistics, slot, torch.zeros(2, 3))
    assert torch.isfinite(statistics.energy).all()
    assert torch.isfinite(scores(statistics, slot)).all()


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 5, 1)])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 1.0])
def test_selection_keeps_the_highest_scores_of_each_layer(sizes, density):
    selection = CoarseSelection(sizes, density, torch.float32, CPU)
    addresses = [mask.data_ptr() for mask in selection.mask]
    scores = torch.rand(sum(sizes))
    selection.select(scores)
    for mask, layer_scores in zip(selection.mask, scores.split(sizes), strict=True):
        kept = num_kept_neurons(density, len(mask))
        assert mask.sum() == kept == max(1, round(density * len(mask)))
        if kept < len(mask):
            assert layer_scores[mask == 1].min() > layer_scores[mask == 0].max()
    assert addresses == [mask.data_ptr() for mask in selection.mask]


def test_fine_mask_keeps_each_tokens_largest_gates():
    gate = torch.tensor([[1.0, -5.0, 2.0, 0.0], [0.1, 0.2, -0.3, 0.4]])
    assert fine_mask(gate, 0.5).tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert fine_mask(gate, 1.0).min() == 1


def test_memory_is_what_the_tables_hold():
    statistics = NeuronStatistics((10, 10), 4, 8, CPU)
    assert statistics.num_bytes == (4 + 1) * 20 * 4 + 20 * 4 + 8 * 20 * 2
    assert math.isfinite(scores(statistics).sum())


def test_after_new_weights_nothing_is_known_and_slots_stay_taken():
    statistics = NeuronStatistics([4, 2], num_slots=3, max_pending_rows=4, device=torch.device("cpu"))
    untouched = statistics.scores(torch.tensor([statistics.nobody])).clone()
    slot = statistics.acquire()
    statistics.begin_step([ObservedRows(slot, 0, 2, pending=False)])
    for layer, size in enumerate((4, 2)):
        statistics.observe(layer, torch.randn(2, size))
    statistics.end_step()
    statistics.learn_prior(slot)
    assert not torch.equal(statistics.scores(torch.tensor([slot])), untouched)
    statistics.forget()
    assert torch.equal(statistics.scores(torch.tensor([slot])), untouched)
    assert statistics.acquire() != slot
