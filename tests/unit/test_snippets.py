"""What the documentation tells people to run is whole and is run: guards, sizes, options that exist, a test for each command."""

from __future__ import annotations

import ast
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


def is_slow(function):
    return any("slow" in ast.unparse(decorator) for decorator in function.decorator_list)


def run_by_tests(reader):
    """First arguments of all calls of a function of `support.snippets` in the end-to-end tests that every run makes."""
    found = []
    for path in [*sorted((ROOT / "tests").glob("e2e/test_*.py")), ROOT / "tests/support/wheel_environment.py"]:
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        calls = [node for function in functions if not is_slow(function) for node in ast.walk(function)]
        for call in calls:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == reader:
                found.append(ast.literal_eval(call.args[0]))
    return found


def test_each_command_of_the_readme_is_run_by_a_test():
    """By a test that takes the command's words from the README, so that it runs what the README says today."""
    written = [command for block in code_blocks(README, "bash") for command in commands(block)]
    assert len(written) == len(set(written)) > 5
    starts = run_by_tests("readme_command")
    assert [start for start in starts if sum(command.startswith(start) for command in written) != 1] == []
    assert [command for command in written if not command.startswith(tuple(starts))] == []
    programs = code_blocks(README, "python")
    assert [
        program for program in programs if not any(words in program for words in run_by_tests("readme_program"))
    ] == []


def test_continuous_integration_runs_what_the_documentation_says():
    """`make` targets in `.ci/run` exist, and those that the contributors' page names are all there."""
    targets = re.search(r"^for target in (.*); do$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert targets
    named = re.search(
        r"is the continuous integration: (.*?) in a fresh", (ROOT / "docs" / "development.md").read_text()
    )
    assert named
    assert re.findall(r"`([a-z-]+)`", named[1]) == targets[1].split() == ["lint", "docs", "test", "test-patched"]
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    written = {
        word for path in DOCUMENTS for word in re.findall(r"^make ([a-z-]+)", path.read_text(), flags=re.MULTILINE)
    }
    assert set(targets[1].split()) | written <= set(known)
