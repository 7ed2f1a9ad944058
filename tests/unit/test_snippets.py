"""What the documentation tells people to run is whole: guards, sizes, options that exist. `test_examples.py` runs it."""

from __future__ import annotations

import re

import pytest
from support.real_models import ROOT
from support.snippets import README, code_blocks, commands, readme_command

from vllm_sirius.cli import _parser

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
PROGRAMS = [path for path in ROOT.glob("examples/**/*") if path.suffix in (".py", ".sh")]
ENGINE = re.compile(r"\bvllm (?:serve|run-batch|bench latency)\b")
SIZES = ("--max-model-len", "--kv-cache-memory-bytes")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_start_an_engine_size_its_memory(path):
    for block in code_blocks(path, "bash"):
        for command in commands(block):
            assert not ENGINE.search(command) or all(size in command for size in SIZES), command


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_size_the_memory_of_engines(path):
    text = path.read_text()
    for command in commands(text.replace("#   ", "")):
        if ENGINE.search(command) and "``" not in command and "`vllm" not in command:
            assert all(size in command for size in SIZES), command
    if re.search(r"\bLLM\(", text):
        assert "max_model_len=" in text
        assert "kv_cache_memory_bytes=" in text


def test_programs_can_be_imported_by_the_processes_that_vllm_starts():
    """Those with an engine have a guard in the snippet itself, and name both sizes."""
    programs = [block for path in DOCUMENTS for block in code_blocks(path, "python") if re.search(r"\bLLM\(", block)]
    programs += [path.read_text() for path in PROGRAMS if re.search(r"^\s+llm = LLM\(", path.read_text(), re.MULTILINE)]
    assert len(programs) >= 2
    for program in programs:
        assert re.search(r'^if __name__ == "__main__":', program, flags=re.MULTILINE)
        assert not re.search(r"^\w[^\n]*\bLLM\(", program, flags=re.MULTILINE), "an engine outside of the guard"
        assert "max_model_len=" in program
        assert "kv_cache_memory_bytes=" in program


@pytest.mark.parametrize("start", ["vllm-sirius doctor MODEL", "vllm-sirius doctor --fix", "vllm-sirius tune"])
def test_commands_of_the_project_exist(start):
    words = [word.strip("[]") for word in readme_command(start)]
    assert _parser().parse_args(words[1:]).command == words[1]
    assert README.is_file()
