"""What drafts derive from the target's weights as they are shown."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_sirius.config import SiriusConfig
from vllm_sirius.draft.copies import DraftCopies
from vllm_sirius.draft.locate import GatedFFN

HIDDEN, NEURONS = 8, 5


@pytest.fixture
def built_in_bfloat16():
    """Models are built with their own dtype as the default one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("built_in_bfloat16")
def test_norms_of_neurons_keep_single_precision_whatever_the_model_is_built_in():
    gate_up, down = nn.Linear(HIDDEN, 2 * NEURONS, bias=False), nn.Linear(NEURONS, HIDDEN, bias=False)
    ffn = GatedFFN("mlp", nn.Module(), gate_up, down, "act_fn", None, True, HIDDEN, NEURONS)
    copies = DraftCopies([ffn], SiriusConfig().resolved(copies=False), wanted=False, head=None)
    weight = torch.randn(HIDDEN, NEURONS)
    copies.ffns[0].read_gate_up(gate_up.weight.data)
    copies.ffns[0].read_down(weight)
    assert copies.neuron_norms.dtype == torch.float32
    assert torch.equal(copies.neuron_norms, weight.float().square().sum(dim=0))
    assert copies.ffns[0].num_read == 2
    assert (copies.num_copied, copies.linears()) == (0, None)
