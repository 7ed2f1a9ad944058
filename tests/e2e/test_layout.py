"""A real step of Model Runner V1 goes the way that docs/layout.md shows."""

from __future__ import annotations

import re

import pytest
from support.real_models import ROOT, SMOL, chat_prompts, model_path
from support.runners import only_v1

HOP = re.compile(r"^\|[^|]*\| `(\S+\.py)` \| `(\w+)` \| ([^|]*) \|$", re.MULTILINE)


def documented() -> list[tuple[list[str], bool]]:
    """The hops in their order, and whether they are of coarse drafts alone."""
    text = (ROOT / "docs" / "layout.md").read_text().partition("## One step")[2]
    return [([file, function], "coarse: " in what) for file, function, what in HOP.findall(text)]


@only_v1
@pytest.mark.parametrize("options", [{}, {"sparsity": "coarse"}], ids=["default", "coarse"])
def test_a_step_goes_the_way_of_the_documentation(host, options):
    hops = documented()
    assert len(hops) == 18
    engine = {
        "model": model_path(SMOL),
        "max_model_len": 512,
        "max_num_seqs": 2,
        "speculative_config": {"method": "sirius", **options},
    }
    host.probe(engine, "support.probes:make_drafts_pay")
    prompt = chat_prompts(SMOL, "gsm8k", 1)[0]
    found = host.probe(engine, "support.traces:hops_of_a_step", hops=[hop for hop, _ in hops], prompt=prompt)
    assert found == [hop for hop, coarse in hops if options or not coarse]
