"""Where the rows of an FFN lie: each layout holds every row once, and on CPU they ask for huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vllm_sirius.weights.rows import by_neuron, gates_first, neuron_rows

SMAPS, HUGE_PAGES = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage")


@pytest.mark.parametrize("gate_is_first", [True, False])
@pytest.mark.parametrize("layout", [by_neuron, gates_first])
@pytest.mark.parametrize("neurons", [1, 2, 7])
def test_a_layout_finds_the_rows_of_every_neuron(layout, neurons, gate_is_first):
    gate, up, down = (torch.randn(neurons, 5) for _ in range(3))
    gate_up = torch.cat([gate, up] if gate_is_first else [up, gate])
    rows, place = neuron_rows(gate_up, down.T, gate_is_first, layout), layout(neurons, 5)
    assert rows.is_contiguous()
    assert rows.shape == place.shape
    for index, expected in ((place.gate, gate), (place.up, up), (place.down, down)):
        assert torch.equal(rows[index], expected)


def test_gates_lie_in_one_stretch_and_up_and_down_next_to_each_other():
    gate, up, down = (torch.full((3, 2), value) + torch.arange(3.0)[:, None] for value in (10.0, 20.0, 30.0))
    rows = neuron_rows(torch.cat([gate, up]), down.T, layout=gates_first)
    assert rows[:, 0].tolist() == [10, 11, 12, 20, 30, 21, 31, 22, 32]


@pytest.mark.skipif(not (SMAPS.exists() and HUGE_PAGES.exists()), reason="needs Linux with transparent huge pages")
@pytest.mark.parametrize("layout", [by_neuron, gates_first])
def test_rows_ask_for_huge_pages(layout):
    rows = neuron_rows(torch.randn(4096, 1024), torch.randn(1024, 2048), layout=layout)
    address = rows.data_ptr() + rows.nbytes // 2
    flags, inside = None, False
    for line in SMAPS.read_text().splitlines():
        if ends := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(ends[1], 16) <= address < int(ends[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()
    assert flags is not None
    assert "hg" in flags
