"""Variables of the project are named so that vLLM, which takes every ``VLLM_*`` for its own, does not stumble over them."""

import ast
import os
import re

import pytest
from hook_probes import error_of
from support.real_models import ROOT, SMOL, model_path
from test_hooks import ask

NAME = re.compile(r"(VLLM|SIRIUS)_[A-Z0-9_]+")


def names_in(file):
    """Strings and keywords in a file that are a name and nothing else; in a shell script all words that are one."""
    text = file.read_text()
    if file.suffix == ".sh":
        return {match.group() for match in re.finditer(rf"\b{NAME.pattern}", text)}
    nodes = list(ast.walk(ast.parse(text)))
    words = [node.value for node in nodes if isinstance(node, ast.Constant)]
    words += [node.arg for node in nodes if isinstance(node, ast.keyword)]
    return {word for word in words if isinstance(word, str) and NAME.fullmatch(word)}


def probe_validation(model, ours):
    """What vLLM knows, and whether an engine that insists on it starts with all variables of the project."""
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs

    def create():
        options = {"method": "sirius"}
        return error_of(
            EngineArgs(
                model=model, max_model_len=128, speculative_config=options, fail_on_environ_validation=True
            ).create_engine_config
        )

    os.environ.update(dict.fromkeys(ours, "1"))
    accepted = create()
    os.environ["VLLM_SIRIUS_CACHE"] = "1"
    return {"known": list(envs.environment_variables), "accepted": accepted, "refused": create()}


@pytest.fixture(scope="module")
def named():
    """Names by the file that has them."""
    folders = [ROOT / folder for folder in ("vllm_sirius", "benchmarks", "examples", "patches")]
    files = [file for folder in folders for suffix in ("py", "sh") for file in folder.rglob(f"*.{suffix}")]
    assert len(files) > 100
    return {file: names_in(file) for file in files}


def test_vllm_knows_every_variable_with_its_prefix_and_none_of_ours_has_it(named):
    ours = sorted({name for names in named.values() for name in names if name.startswith("SIRIUS_")})
    documented = re.findall(r"^\| `(SIRIUS_[A-Z_]+)", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert len(documented) >= 3
    assert set(documented) <= set(ours)
    found = ask(probe_validation, model_path(SMOL), ours)
    theirs = {name: str(file) for file, names in named.items() for name in names if name.startswith("VLLM_")}
    assert "VLLM_PLUGINS" in theirs
    assert {name: file for name, file in theirs.items() if name not in found["known"]} == {}
    assert found["accepted"] is None
    assert "VLLM_SIRIUS_CACHE" in found["refused"]
