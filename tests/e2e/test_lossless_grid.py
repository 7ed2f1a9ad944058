"""Lossless and greedy in fp32: sparsities, densities and batch sizes are token-identical to vLLM alone (runner v1)."""

import pytest
from support.lossless import check_identical
from support.real_models import QWEN_SMALL, SMOL
from support.runners import only_v1


def cases(slow_densities=()):
    return [
        pytest.param(
            *(sparsity, density, batch),
            id=f"{sparsity}-{density}-batch{batch}",
            marks=pytest.mark.slow if density in slow_densities else (),
        )
        for sparsity in ("coarse", "fine")
        for density in (0.3, 0.5)
        for batch in (1, 8)
    ]


@only_v1
@pytest.mark.parametrize("num_prompts", [8, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("sparsity", "density", "batch"), cases(slow_densities=[0.5]))
def test_smollm2_is_token_identical(host, sparsity, density, batch, num_prompts):
    check_identical(host, SMOL, batch, {"sparsity": sparsity, "density": density}, num_prompts)


@only_v1
@pytest.mark.slow
@pytest.mark.parametrize(("sparsity", "density", "batch"), cases())
def test_qwen_is_token_identical(host, sparsity, density, batch):
    check_identical(host, QWEN_SMALL, batch, {"sparsity": sparsity, "density": density}, num_prompts=24)


@only_v1
@pytest.mark.slow
def test_qwen_is_token_identical_in_short(host):
    check_identical(host, QWEN_SMALL, 8, {}, num_prompts=8)
