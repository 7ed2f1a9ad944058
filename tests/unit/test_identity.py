"""The comparisons of `benchmarks.identity`; its engines are the benchmark's own business."""

from benchmarks.identity import Difference, Run, Verdict, differences, judge_identity, share_of_equal


def test_answers_part_at_their_first_different_token():
    theirs = [[1, 2, 3], [4, 5, 6], [7, 8], [9]]
    assert differences(theirs, theirs) == []
    assert differences([[1, 2, 3], [4, 0, 0], [7], [9, 9]], theirs) == [
        Difference(1, 1),
        Difference(2, 1),
        Difference(3, 1),
    ]


def test_only_prompts_that_are_the_same_in_every_run_count():
    runs = [[[1], [2], [3], [4]], [[1], [2], [3], [4]], [[1], [0], [3], [4]]]
    assert share_of_equal(runs) == "3/4 (75.0%)"
    assert share_of_equal(runs[:2]) == "4/4 (100.0%)"


def test_identity_counts_differences_and_drafts():
    alone = {(1, "greedy"): Run([[1, 2], [3, 4]]), (8, "greedy"): Run([[1, 2], [3, 4]])}
    drafted = {(1, "greedy"): Run([[1, 2], [3, 4]], 9, 5), (8, "greedy"): Run([[1, 2], [3, 0]], 8, 0)}
    verdict = Verdict()
    judge_identity("eager", alone, drafted, verdict)
    assert verdict.identity == [
        ["eager", "1", "greedy", "2/2", "-", "9", "5"],
        ["eager", "8", "greedy", "1/2", "prompt 1, token 1", "8", "0"],
    ]
    assert (verdict.num_different, verdict.idle) == (1, [])
    # An engine that accepted nothing shows nothing.
    judge_identity("compiled", alone, {key: Run(run.token_ids, 3, 0) for key, run in drafted.items()}, verdict)
    assert verdict.idle == ["compiled"]
