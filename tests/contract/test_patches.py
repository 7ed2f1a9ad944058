"""The source patches fit the installed vLLM, the ledger says what they are, and with them no hook is installed.

That a patched vLLM behaves as one with hooks is shown by `test_hooks.py`, whose tests of behaviour run on both, and by
`make test-patched`, which runs end-to-end tests on a patched copy.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hook_probes import NGRAM, error_of, plain
from support.real_models import ROOT, SMOL, model_path
from test_hooks import ask, read_ledger

from vllm_sirius.version import TARGET_VLLM_VERSION

SERIES = sorted((ROOT / "patches" / f"vllm-{TARGET_VLLM_VERSION}").glob("*.patch"))


def touched_files(patch):
    return re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(), re.MULTILINE)


def patches_section():
    text = (ROOT / "patches" / "README.md").read_text()
    section = text.partition("## Source patches")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+\.patch)` \| [^|]+ \| ([^|]+) \|", section, re.MULTILINE)


def probe_attachment(model):
    """What the plugin leaves in a process, and what vLLM's own registry says."""
    from types import SimpleNamespace

    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.platforms import current_platform
    from vllm.plugins import speculative_methods

    from vllm_sirius import plugin
    from vllm_sirius.integration import native
    from vllm_sirius.integration.cpu_worker import SiriusCPUWorker
    from vllm_sirius.integration.hook_engine import _MARK, is_installed, resolve
    from vllm_sirius.integration.installed_hooks import HOOKS, worker_hooks

    EngineArgs(model=model, max_model_len=128, speculative_config={"method": "sirius"}).create_engine_config()
    _, runner = SiriusCPUWorker._runner_of_sirius(SimpleNamespace(use_v2_model_runner=False))
    stored = {hook.target: plain(resolve(hook.target)[2]) for hook in (*HOOKS, *worker_hooks())}

    from vllm.v1.sample.rejection_sampler import RejectionSampler

    from vllm_sirius.integration.runner_v1 import rejection_sample
    from vllm_sirius.integration.runner_v1.rejection_sampler import SiriusRejectionSampler

    current_platform.register_triton_kernel_overrides()
    whole = error_of(rejection_sample.assert_rule_is_in_force)
    rule = RejectionSampler.rejection_sample
    del RejectionSampler.rejection_sample
    partial = error_of(rejection_sample.assert_rule_is_in_force)
    RejectionSampler.rejection_sample = rule
    plugin._registered = False
    plugin.register()
    again = plugin.unavailable_reason()
    speculative_methods._methods["sirius"] = SimpleNamespace()
    plugin._registered = False
    plugin.register()
    return {
        "vllm": vllm.__file__,
        "runner": runner.__name__,
        "installed": [hook.target for hook in (*HOOKS, *worker_hooks()) if is_installed(hook)],
        "marked": [target for target, found in stored.items() if hasattr(found, _MARK)],
        "code": {target: found.__code__.co_filename for target, found in stored.items() if hasattr(found, "__code__")},
        "methods": speculative_methods.registered_speculative_methods(),
        "overridden": SiriusRejectionSampler.rejection_sample is not rule,
        "whole": whole,
        "partial": partial,
        "again": again,
        "taken": plugin.unavailable_reason(),
        "registered_after": native.is_registered(),
    }


def probe_reuse(model):
    """The same arguments, used twice, with an option and a flag that upstream merges into the caller's dictionary."""
    from vllm.engine.arg_utils import EngineArgs

    options = {key: value for key, value in NGRAM.items() if key != "num_speculative_tokens"}
    arguments = EngineArgs(model=model, max_model_len=128, speculative_config=options, spec_tokens=3)
    lengths = [arguments.create_engine_config().speculative_config.num_speculative_tokens for _ in range(2)]
    return {"lengths": lengths, "options": options}


@pytest.fixture(scope="module")
def attachment(patched_copy):
    return ask(probe_attachment, model_path(SMOL), patched_copy=patched_copy)


def test_every_hook_names_a_patch_and_every_patch_a_hook():
    named = {target: row["Patch"].strip("`") for target, row in read_ledger()[0].items()}
    assert set(named.values()) == {path.name for path in SERIES}
    rows = patches_section()
    assert [name for name, _ in rows] == [path.name for path in SERIES]
    for name, hooks in rows:
        symbols = re.findall(r"`([^`]+)`", hooks)
        assert len(symbols) == sum(patch == name for patch in named.values())
        for symbol in symbols:
            (target,) = [t for t in named if t.partition(":")[2] == symbol or t.endswith("." + symbol)]
            assert named[target] == name, target


def test_every_patch_says_what_it_is():
    for number, path in enumerate(SERIES, start=1):
        head = path.read_text().partition("\n---\n")[0]
        assert path.name.startswith(f"{number:04d}-")
        subject, _, reason = head.partition("Subject: ")[2].partition("\n\n")
        assert f"[PATCH {number}/{len(SERIES)}]" in subject
        assert len(reason.split()) >= 15, f"{path.name} gives no reason"


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program patch")
def test_series_applies_by_patch_without_fuzz(tmp_path):
    site = Path(find_spec("vllm").origin).parent.parent
    for name in {name for path in SERIES for name in touched_files(path)}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (site / name).exists():
            shutil.copy(site / name, tmp_path / name)
    for path in SERIES:
        command = ["patch", "-p1", "--fuzz=0", "--forward", "--directory", str(tmp_path), "--input", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert "fuzz" not in done.stdout
        assert "offset" not in done.stdout


def test_copy_is_whole_and_patched_files_parse(patched_copy):
    installed = Path(find_spec("vllm").origin).parent
    touched = {name for path in SERIES for name in touched_files(path)}
    for name in touched:
        ast.parse((patched_copy / name).read_text())
    added = [name for name in touched if not (installed.parent / name).exists()]
    assert added == ["vllm/plugins/speculative_methods.py"]
    changed = []
    for source in installed.rglob("*"):
        if source.is_dir() or "__pycache__" in source.parts:
            continue
        copied = patched_copy / source.relative_to(installed.parent)
        if source.suffix == ".so":
            assert copied.resolve() == source.resolve()
        elif copied.read_bytes() != source.read_bytes():
            changed.append(str(source.relative_to(installed.parent)))
    assert sorted(changed) == sorted(touched - set(added)), "the installed package differs or a file was not copied"


def test_plugin_registers_and_installs_no_hook(attachment, patched_copy):
    assert Path(attachment["vllm"]).is_relative_to(patched_copy)
    assert attachment["methods"] == ["sirius"]
    assert attachment["runner"] == "SiriusCPUModelRunner"
    assert attachment["installed"] == []
    assert attachment["marked"] == []
    assert len(attachment["code"]) >= 8
    for target, path in attachment["code"].items():
        assert Path(path).is_relative_to(patched_copy), target


def test_rule_is_a_method_and_a_partial_series_is_refused(attachment):
    assert attachment["overridden"]
    assert attachment["whole"] is None
    assert "apply the whole series" in attachment["partial"]


def test_registering_twice_is_harmless_and_a_taken_name_is_explained(attachment):
    assert attachment["again"] is None
    assert "already registered" in attachment["taken"]
    assert not attachment["registered_after"]


def test_same_arguments_serve_twice(patched_copy):
    found = ask(probe_reuse, model_path(SMOL), patched_copy=patched_copy)
    assert found["lengths"] == [3, 3]
    assert found["options"] == {"method": "ngram", "prompt_lookup_max": 2}


def apply(folder, installed=None):
    """Runs the program; `installed` holds another package `vllm` to be found in the place of the real one."""
    command = [sys.executable, str(ROOT / "patches" / "apply.py"), str(folder)]
    variables = dict(os.environ) if installed is None else {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_a_copy_is_not_overwritten(patched_copy):
    done = apply(patched_copy)
    assert done.returncode == 1
    assert "remove it first" in done.stderr


@pytest.mark.parametrize(
    ("version", "words"), [("0.31.0+cpu", "no patches for vLLM 0.31.0"), (TARGET_VLLM_VERSION, "do not fit")]
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, version, words):
    package = tmp_path / "installed" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    done = apply(tmp_path / "copy", installed=package.parent)
    assert done.returncode == 1
    assert words in done.stderr
    assert not (tmp_path / "copy" / "vllm").exists()
