"""The documentation fits the code and itself: options as in `SiriusConfig`, links that lead somewhere, a short README."""

from __future__ import annotations

import dataclasses
import re

import pytest
from support.real_models import ROOT
from support.snippets import README

from docs.tools import options
from vllm_sirius.config import SiriusConfig

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "patches" / "README.md", *ROOT.glob("benchmarks/**/*.md")]
LAYOUT = ROOT / "docs" / "layout.md"


def test_the_page_of_options_is_what_the_code_says():
    assert options.PAGE.read_text() == options.page(), "run: python docs/tools/options.py"


def test_the_table_of_options_can_be_scanned():
    """A line for each option, and no line that is a paragraph."""
    rows = re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \|.*\| (.*) \|$", options.PAGE.read_text(), flags=re.MULTILINE)
    assert [name for name, _ in rows] == [field.name for field in dataclasses.fields(SiriusConfig)]
    assert all(len(text) <= 110 for _, text in rows)


def test_an_option_without_a_text_is_not_forgotten():
    texts = options.descriptions(
        "Title.\n\nAttributes:\n    one: First. Second ``x``,\n        still second.\n    two: Other.\n"
    )
    assert texts == {"one": "First. Second `x`, still second.", "two": "Other."}
    assert options.first_sentence(texts["one"]) == "First."
    with pytest.raises(LookupError, match="no values in what is said of method"):
        options.values_of("method")  # vLLM's own key, which is not judged here


def test_the_readme_is_short_and_says_the_catch_at_once():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    beginning = " ".join(lines[:10])
    for words in ("four bits", "contextual sparsity", "AVX-512", "27 %", "bfloat16", "GPU", "The catch"):
        assert words in beginning
    assert "four bits" in " ".join(lines[:5])
    assert sum(line.startswith("|---") for line in lines) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(page):
    """As they are read without the site; `make docs` judges headings and navigation as well."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).is_file(), target


def test_the_layout_names_what_is_there():
    text = LAYOUT.read_text()
    named = re.findall(r"^(\S+?/?)\s{2,}\S", text.split("```")[1], flags=re.MULTILINE)
    assert [name for name in named if not (ROOT / name).exists()] == []
    rooms = {f"vllm_sirius/{path.parent.name}/" for path in ROOT.glob("vllm_sirius/*/__init__.py")}
    assert rooms <= set(named)


def test_each_hop_of_one_step_is_a_function_of_its_file():
    hops = re.findall(r"^\|[^|]*\| `(\S+\.py)` \| `(\w+)` \|", LAYOUT.read_text(), flags=re.MULTILINE)
    assert len(hops) >= 10
    for file, function in hops:
        source = (ROOT / "vllm_sirius" / file).read_text()
        assert re.search(rf"^\s*def {function}\(", source, flags=re.MULTILINE), (file, function)
    named = re.findall(r"`([\w/]+\.py)`", LAYOUT.read_text().partition("## One step")[2])
    assert [name for name in named if not (ROOT / "vllm_sirius" / name).is_file()] == []
