"""Lossless and greedy in fp32: the default, sparsities, densities and batch sizes are token-identical to vLLM alone (V1)."""

import pytest
from support.lossless import check_identical
from support.real_models import QWEN_SMALL, SMOL
from support.runners import only_v1

DRAFTS = {
    "default": None,
    **{
        f"{sparsity}-{density}": {"sparsity": sparsity, "density": density}
        for sparsity in ("coarse", "fine")
        for density in (0.3, 0.5)
    },
}
QUICK = {("default", 1), ("default", 8), ("coarse-0.3", 8), ("fine-0.3", 8)}
"""What `make test` runs."""


def cases(quick=()):
    return [
        pytest.param(
            *(draft, batch), id=f"{draft}-batch{batch}", marks=() if (draft, batch) in quick else pytest.mark.slow
        )
        for draft in DRAFTS
        for batch in (1, 8)
    ]


@only_v1
@pytest.mark.parametrize("num_prompts", [8, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("draft", "batch"), cases(QUICK))
def test_smollm2_is_token_identical(host, draft, batch, num_prompts):
    check_identical(host, SMOL, batch, DRAFTS[draft], num_prompts)


@only_v1
@pytest.mark.parametrize(("draft", "batch"), cases())
def test_qwen_is_token_identical(host, draft, batch):
    check_identical(host, QWEN_SMALL, batch, DRAFTS[draft], num_prompts=24)


@only_v1
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", [SMOL, QWEN_SMALL])
def test_compiled_engines_are_token_identical(host, name, batch):
    check_identical(host, name, batch, None, num_prompts=24, enforce_eager=False)
