"""One run of the tuner, from the command line to the files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm_sirius.measuring import memory
from vllm_sirius.measuring.inspection import inspect
from vllm_sirius.tuning.errors import TuningError, TuningInterrupted
from vllm_sirius.tuning.grid import DEFAULT_DRAFTS, DRAFTS, RULES, Draft, choose_drafts
from vllm_sirius.tuning.measure import compare, measure_draft, steps_of_a_draft, steps_of_the_comparison
from vllm_sirius.tuning.options import TuningOptions
from vllm_sirius.tuning.predict import Prediction, choose
from vllm_sirius.tuning.progress import Progress
from vllm_sirius.tuning.prompts_file import read_prompts
from vllm_sirius.tuning.report import Findings, format_findings, judge, write_files
from vllm_sirius.tuning.setting import TuningSetting, make_setting

LOW_BIT_SHARE = 0.5
"""Bytes of int8 copies over those of the 16-bit weights."""


def tune(options: TuningOptions, grid: Sequence[Draft] = DRAFTS) -> str:
    """Measures the grid, puts the winners to the test, and writes the files.

    Args:
        options: What the user asked for, checked.
        grid: The drafts to measure.

    Returns:
        The result as text.

    Raises:
        TuningError: If something is missing or an engine fails.
        TuningInterrupted: If the user stopped the run; its engines are ended.
        SiriusError: If Sirius cannot serve the model.
    """
    try:
        setting, drafts = _prepare(options, grid)
    except KeyboardInterrupt as stop:
        raise TuningInterrupted("interrupted before the first engine started: nothing is lost") from stop
    findings = Findings(setting)
    try:
        with _log_folder(findings) as folder:
            _measure(findings, drafts, folder)
        _write_files(findings)
    except KeyboardInterrupt as stop:
        raise TuningInterrupted(what_is_lost(findings, len(drafts))) from stop
    return format_findings(findings)


def _write_files(findings: Findings) -> None:
    try:
        write_files(findings)
    except OSError as error:
        # Measuring took long: what was found must not be lost with the file.
        raise TuningError(
            f"a file cannot be written ({error}). What was found:\n\n{format_findings(findings)}"
        ) from error


def what_is_lost(findings: Findings, num_drafts: int) -> str:
    """What an interruption costs, for the user.

    Args:
        findings: What was measured until then.
        num_drafts: Drafts of the grid.

    Returns:
        One sentence.
    """
    lost = f"the measurements of {len(findings.drafts)} of {num_drafts} drafts are lost"
    if len(findings.drafts) == num_drafts:
        lost = "the measurements of all drafts and the comparison of the winners are lost"
    return f"interrupted: {lost}, and no file was written"


def _prepare(options: TuningOptions, grid: Sequence[Draft]) -> tuple[TuningSetting, list[Draft]]:
    assert options.prompts is not None
    prompts = read_prompts(options.prompts, options.num_prompts)
    inspection = inspect(options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    setting = make_setting(options, inspection, prompts)
    drafts = choose_drafts(grid, options.quick, low_bit=not inspection.no_low_bit)
    if not drafts:
        raise TuningError(f"the grid has no draft for this machine: int8 and int4 need more ({inspection.no_low_bit}).")
    if inspection.platform == "cpu":
        _check_memory(setting)
    return setting, drafts


def _check_memory(setting: TuningSetting) -> None:
    """Refuses a model whose three engines of the comparison do not fit side by side."""
    inspection = setting.inspection
    # The largest copy that a draft of the grid makes; the target has its own weights beside it.
    copies = int(max(inspection.ffn_share, LOW_BIT_SHARE) * inspection.step_bytes)
    model, cache = setting.options.model, setting.engine["kv_cache_memory_bytes"]
    needed = memory.engine_bytes(model, inspection.step_bytes, cache)
    needed += len(RULES) * memory.engine_bytes(model, inspection.step_bytes, cache, copies)
    free = memory.available_bytes()
    if needed > free:
        raise TuningError(
            f"vLLM alone and the two winners side by side need about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB "
            "are available: end other programs, use a smaller --batch or --max-model-len, or a smaller model."
        )


@contextmanager
def _log_folder(findings: Findings) -> Iterator[Path]:
    """A folder for the engines' logs, which stays if an engine failed: messages name files in it."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-sirius-tune-"))
    try:
        yield folder
    except TuningError:
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    if not any(measured.refused for measured in findings.drafts):
        shutil.rmtree(folder)


def _measure(findings: Findings, drafts: Sequence[Draft], folder: Path) -> None:
    setting = findings.setting
    total = len(drafts) * steps_of_a_draft(setting) + steps_of_the_comparison(setting)
    with Progress(total) as progress:
        progress.say(setting.conditions)
        if setting.why_these_prompts:
            progress.say(setting.why_these_prompts)
        for number, draft in enumerate(drafts, start=1):
            findings.drafts.append(measure_draft(setting, draft, folder / f"draft-{number}.log", progress))
        findings.arms = compare(setting, choose_winners(findings), folder, progress)
    findings.verdicts = judge(findings.arms)


def choose_winners(findings: Findings) -> list[Prediction]:
    """The best draft and kernel size under each rule, by prediction; the default draft where it is as good.

    Args:
        findings: The measured grid.

    Returns:
        One prediction for each rule.

    Raises:
        TuningError: If no draft could be measured.
    """
    measured = [one for one in findings.drafts if not one.refused]
    if not measured:
        reasons = "".join(f"\n  {one.draft.title}: {one.refused}" for one in findings.drafts)
        raise TuningError(f"no draft could be measured:{reasons}")
    titles = [one.draft.title for one in measured]
    default = next((title for title in DEFAULT_DRAFTS if title in titles), "")
    return [choose([p for one in measured for p in one.predictions[rule]], default) for rule in RULES]
