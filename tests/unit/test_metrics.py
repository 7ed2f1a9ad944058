"""The speed model and the paper's metrics, against numbers of the paper."""

from types import SimpleNamespace

import pytest

from vllm_sirius.cli import acceptance_length
from vllm_sirius.metrics import (
    SpeculationCounts,
    effective_density,
    predicted_speedup,
    read_counts,
)
from vllm_sirius.weights.rows import rows_read


def test_effective_density_reproduces_the_papers_rows():
    # Llama-3-8B-Instruct: GSM8K coarse (d .65, AAL 15.22 of 16) has .706; GSM8K fine (d .76, AAL 15.37) has .807.
    assert effective_density(0.649, 15, 15.22) == pytest.approx(0.706, abs=1e-3)
    assert effective_density(0.766, 15, 15.37) == pytest.approx(0.807, abs=6e-3)


@pytest.mark.parametrize(("sparsity", "density"), [("coarse", 0.649), ("fine", 0.766)])
def test_rows_that_drafts_of_llama_3_8b_read_give_the_papers_densities(sparsity, density):
    rows, total = 32 * rows_read(14336, 0.5, sparsity), 8.03e9
    ffn = 32 * 3 * 4096 * 14336
    assert (4096 * rows + total - ffn) / total == pytest.approx(density, abs=1e-3)
    assert rows_read(14336, 0.5, "none") == 3 * 14336


def test_speedup_of_a_free_draft_is_the_acceptance_length():
    assert predicted_speedup(8.0, 15, 0.0, 1.0) == 8.0
    assert predicted_speedup(16.0, 15, 1.0, 1.0) == 1.0


def test_counts_are_read_from_vllms_metrics():
    metrics = [
        SimpleNamespace(name="vllm:spec_decode_num_drafts", value=10),
        SimpleNamespace(name="vllm:spec_decode_num_draft_tokens", value=150),
        SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens", value=110),
        SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=[10, 9]),
    ]
    counts = read_counts(metrics)
    assert counts == SpeculationCounts(10, 150, 110, (10, 9))
    assert counts.acceptance_length == 12.0
    assert counts.since(SpeculationCounts(4, 60, 50, (3,))) == SpeculationCounts(6, 90, 60, (7, 9))
    assert read_counts([]).acceptance_length == 1.0


def test_acceptance_length_of_a_constant_rate():
    assert acceptance_length(0.0, 16) == 1.0
    assert acceptance_length(1.0, 16) == 16.0
    assert acceptance_length(0.5, 3) == 1.75
