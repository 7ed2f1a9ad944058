"""The acceptance rules on hand-worked numbers."""

import math

import torch

from vllm_sirius.acceptance import (
    accept_by_threshold,
    accept_drawn,
    accept_own_choice,
    emit_tokens,
    uniform_noise,
)


def logits_of(*rows: list[float]) -> torch.Tensor:
    """Logits whose softmax at temperature 1 gives these probabilities."""
    return torch.tensor(rows).log()


def rule(draft, logits, threshold, temperature=1.0):
    draft = torch.tensor(draft)
    rows = len(draft)
    own = logits.argmax(-1)
    return accept_by_threshold(
        draft, own, logits, torch.full((rows,), threshold), torch.full((rows,), temperature)
    ).tolist()


def test_threshold_passes_what_the_target_finds_likely_enough():
    logits = logits_of([0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.6, 0.3, 0.1])
    assert rule([0, 1, 2], logits, 0.2) == [True, True, False]
    assert rule([0, 1, 2], logits, 0.05) == [True, True, True]
    assert rule([0, 1, 2], logits, 0.4) == [True, False, False]


def test_likelihood_is_taken_at_the_given_temperature():
    # softmax(log p / T) with p = (.8, .2): at T = .5 the second token has .2^2 / (.8^2 + .2^2) = .0588.
    logits = logits_of([0.8, 0.2])
    assert math.isclose(0.2**2 / (0.8**2 + 0.2**2), 0.0588, abs_tol=1e-4)
    assert rule([1], logits, 0.10, temperature=1.0) == [True]
    assert rule([1], logits, 0.10, temperature=0.5) == [False]
    assert rule([1], logits, 0.05, temperature=0.5) == [True]


def test_the_targets_own_choice_always_passes():
    flat = logits_of([0.3, 0.25, 0.25, 0.2])
    assert rule([0], flat, 0.9) == [True]
    assert rule([1], flat, 0.9) == [False]


def test_threshold_above_one_is_lossless_for_greedy_drafts():
    logits = torch.randn(64, 10)
    draft = torch.randint(0, 10, (64,))
    own = logits.argmax(-1)
    above = accept_by_threshold(draft, own, logits, torch.full((64,), 1.5), torch.ones(64))
    assert torch.equal(above, accept_own_choice(draft, own))
    assert above.any() or not (draft == own).any()


def test_threshold_of_zero_accepts_all_that_the_constraints_allow():
    logits = torch.randn(5, 8) * 30
    logits[3, 2] = float("-inf")  # a grammar forbids token 2 here
    draft = torch.tensor([0, 1, 7, 2, -1])
    accepted = accept_by_threshold(draft, logits.argmax(-1), logits, torch.zeros(5), torch.ones(5))
    assert accepted.tolist() == [True, True, True, False, False]


def test_half_precision_logits_are_judged_in_float32():
    logits = logits_of([0.11, 0.89]).to(torch.bfloat16)
    accepted = accept_by_threshold(torch.tensor([0]), torch.tensor([1]), logits, torch.tensor([0.1]), torch.ones(1))
    assert accepted.tolist() == [True]


def test_placeholders_are_never_the_targets_choice():
    assert accept_own_choice(torch.tensor([-1, 3]), torch.tensor([-1, 3])).tolist() == [False, True]


def test_ragged_batch_emits_prefix_then_one_token_of_the_target():
    # Request 0: 3 drafts, second rejected. Request 1: no drafts. Request 2: 2 drafts, all accepted.
    draft = torch.tensor([10, 11, 12, 30, 31])
    own = torch.tensor([10, 99, 12, 30, 31])
    accepted = torch.tensor([True, False, True, True, True])
    output = emit_tokens(draft, own, accepted, torch.tensor([3, 0, 2]), torch.tensor([13, 20, 32]), 3)
    assert output.tolist() == [[10, 99, -1, -1], [20, -1, -1, -1], [30, 31, 32, -1]]
    assert output.dtype == torch.int32


def test_first_token_rejected_emits_the_recovered_token_alone():
    output = emit_tokens(
        torch.tensor([5, 6]), torch.tensor([7, 6]), torch.tensor([False, True]), torch.tensor([2]), torch.tensor([8]), 2
    )
    assert output.tolist() == [[7, -1, -1]]


def test_a_threshold_token_is_kept_although_the_target_would_say_another():
    output = emit_tokens(
        torch.tensor([5, 6]), torch.tensor([1, 2]), torch.tensor([True, True]), torch.tensor([2]), torch.tensor([3]), 2
    )
    assert output.tolist() == [[5, 6, 3]]


def test_drawn_drafts_pass_by_the_ratio_of_probabilities():
    target = logits_of([0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [0.2, 0.8, 0.0], [0.2, 0.8, 0.0])
    draft = logits_of([0.25, 0.25, 0.5], [0.8, 0.2, 0.0], [0.8, 0.2, 0.0], [0.8, 0.2, 0.0])
    uniform = torch.tensor([0.99, 0.24, 0.26, 0.0])
    passes, others = accept_drawn(torch.tensor([0, 0, 0, -1]), target, draft, uniform)
    # p/q = 2 always passes; 0.2/0.8 passes below a quarter; a placeholder never does.
    assert passes.tolist() == [True, True, False, False]
    # What the draft does not cover: token 1 alone in rows 1 and 2; the whole target where there was no draft.
    torch.testing.assert_close(others[2].exp() / others[2].exp().sum(), torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(others[3].exp(), torch.tensor([0.2, 0.8, 0.0]))


def test_a_draft_from_the_targets_own_distribution_always_passes():
    logits = logits_of([0.7, 0.3], [0.7, 0.3])
    passes, others = accept_drawn(torch.tensor([0, 1]), logits, logits, torch.tensor([0.999, 0.999]))
    assert passes.tolist() == [True, True]
    assert torch.isfinite(others).any(dim=1).all()


def test_accepted_and_replaced_draws_together_follow_the_target():
    torch.manual_seed(0)
    count, target, draft = 200_000, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    drawn = torch.multinomial(draft, count, replacement=True)
    noise = uniform_noise(torch.full((count,), 7), torch.arange(count))
    passes, others = accept_drawn(drawn, target.log().expand(count, 4), draft.log().expand(count, 4), noise)
    replaced = torch.multinomial(others.exp(), 1).squeeze(1)
    emitted = torch.where(passes, drawn, replaced)
    found = torch.bincount(emitted, minlength=4) / count
    torch.testing.assert_close(found, target, atol=0.005, rtol=0)
    assert abs(float(passes.float().mean()) - 0.6) < 0.005  # the overlap of the two


def test_uniform_noise_is_uniform_and_depends_on_seed_and_position():
    noise = uniform_noise(torch.full((100_000,), 3), torch.arange(100_000))
    assert 0.0 <= float(noise.min()) < 0.001
    assert 0.999 < float(noise.max()) < 1.0
    counts = torch.histc(noise, bins=20, min=0.0, max=1.0)
    assert float((counts - 5000).abs().max()) < 5 * math.sqrt(5000)
    other = uniform_noise(torch.full((100_000,), 4), torch.arange(100_000))
    assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1])) < 0.02
    assert torch.equal(noise, uniform_noise(torch.full((100_000,), 3), torch.arange(100_000)))
    negative = uniform_noise(torch.tensor([-5, -(2**62)]), torch.tensor([1, 1]))
    assert ((negative >= 0) & (negative < 1)).all()
