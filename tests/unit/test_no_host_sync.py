"""Nothing on the path of a V2 step waits for the device: by running it under a mode that forbids it, and by reading it.

On CPU every value is at hand, so a synchronisation costs nothing and shows in no clock. What would be one on a GPU goes
through a handful of operators (a number taken out of a tensor, a shape that depends on values), which the mode refuses.
On a machine with a GPU the same functions run under CUDA's own detection as well.
"""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.real_models import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_sirius.acceptance import accept_by_threshold, accept_drawn, accept_own_choice, uniform_noise
from vllm_sirius.drafting.device_batch import DraftBatch, DraftTable
from vllm_sirius.kernels.triton.acceptance import pick_tokens, pick_tokens_reference
from vllm_sirius.sparsity.coarse import CoarseSelection
from vllm_sirius.sparsity.observation import ObservedRows
from vllm_sirius.sparsity.selector import NeuronSelector
from vllm_sirius.sparsity.statistics import NeuronStatistics

SYNCHRONISING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
}
FORBIDDEN_METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize"}
SLOTS, VOCABULARY, STEPS = 6, 40, 3


class NoSync(TorchDispatchMode):
    """Refuses operators that would make the host wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in SYNCHRONISING:
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


def draft_step(device):
    """One whole step as Model Runner V2 makes it, but for the model's own forward passes."""
    table = DraftTable(SLOTS, device)
    for slot in range(SLOTS):
        table.admit(slot, last_position=20, end_token_ids={3}, threshold=0.1)
    statistics = NeuronStatistics((8, 8), SLOTS, 16, device)
    selection = CoarseSelection((8, 8), 0.5, torch.float32, device)
    selector = NeuronSelector(statistics, selection, torch.ones(16, device=device))
    buffers = [torch.zeros(SLOTS, dtype=kind, device=device) for kind in (torch.int32, torch.int64, torch.int32)]
    idx_mapping = torch.tensor([4, 1, 2], device=device)
    mapping = torch.full((SLOTS,), -1, device=device)
    batch = DraftBatch(
        table,
        *buffers,
        mapping,
        torch.zeros(SLOTS, STEPS, dtype=torch.int64, device=device),
        SimpleNamespace(max_model_len=32),
    )
    logits = torch.randn(9, VOCABULARY, device=device)
    own = logits.argmax(dim=-1)
    drafts = torch.randint(0, VOCABULARY, (9,), device=device)
    num_sampled = torch.tensor([2, 1, 0], device=device)
    last_sampled = torch.randint(4, VOCABULARY, (SLOTS, 1), device=device)
    locations = torch.tensor([0, 3, 6, 9], dtype=torch.int32, device=device)
    positions = torch.tensor([5, 6, 7], device=device)
    pick = pick_tokens if device.type == "cuda" else pick_tokens_reference

    def run():
        statistics.begin_step([ObservedRows(4, 0, 3, True), ObservedRows(1, 3, 2, True), ObservedRows(2, 6, 3, False)])
        ones = torch.full((9,), 0.1, device=device)
        accept_own_choice(drafts, own)
        accept_drawn(drafts, logits, logits, uniform_noise(own, drafts))
        pick(own, drafts, accept_by_threshold(drafts, own, logits, ones, ones), locations, STEPS + 1)
        statistics.end_step()
        statistics.commit(idx_mapping, num_sampled)
        statistics.learn_prior(2)
        mapping[:3] = idx_mapping
        batch.begin(3, positions, last_sampled, num_sampled > 0)
        selector.select(torch.where(mapping[:3] >= 0, mapping[:3], statistics.nobody))
        for _ in range(STEPS):
            batch.advance(3, logits[:3].argmax(dim=-1))
        return table.num_drafted

    return run


def test_a_step_asks_the_device_for_nothing():
    with NoSync():
        num_drafted = draft_step(torch.device("cpu"))()
    assert num_drafted[2] == 0  # still in prefill
    assert num_drafted.shape == (SLOTS,)


def test_the_mode_sees_a_number_taken_out_of_a_tensor():
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(3).sum() > 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_detects_no_synchronisation():
    run = draft_step(torch.device("cuda"))
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        num_drafted = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert num_drafted.shape == (SLOTS,)


PATH_OF_A_STEP = [
    "vllm_sirius/kernels/triton/acceptance.py",
    "vllm_sirius/drafting/device_batch.py",
    "vllm_sirius/integration/draft_model.py",
    "vllm_sirius/integration/runner_v2/model_state.py",
    "vllm_sirius/integration/runner_v2/rejection_sampler.py",
    "vllm_sirius/integration/runner_v2/request_state.py",
    "vllm_sirius/integration/runner_v2/speculator.py",
    "vllm_sirius/sparsity/coarse.py",
    "vllm_sirius/sparsity/observation.py",
    "vllm_sirius/sparsity/selector.py",
    "vllm_sirius/sparsity/statistics.py",
]


@pytest.mark.parametrize("file", PATH_OF_A_STEP)
def test_no_line_of_the_path_fetches_a_value(file):
    tree = ast.parse(Path(ROOT / file).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    found = [f"{file}:{call.lineno} .{call.func.attr}()" for call in calls if call.func.attr in FORBIDDEN_METHODS]
    assert found == []
