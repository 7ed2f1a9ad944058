"""What the tuner found: tables, sentences and files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_sirius.measuring.engine import Answers
from vllm_sirius.measuring.machine import describe_machine
from vllm_sirius.tuning.certainty import format_interval, interval
from vllm_sirius.tuning.grid import RULES, THRESHOLD
from vllm_sirius.tuning.measure import Arm, MeasuredDraft
from vllm_sirius.tuning.options import TuningOptions
from vllm_sirius.tuning.predict import PREDICTION_ERROR, best
from vllm_sirius.tuning.setting import TuningSetting

RULE_TITLES = {"lossless": "lossless", "threshold": f"threshold {THRESHOLD:g}"}


@dataclass(frozen=True)
class Verdict:
    """A winner, measured.

    Attributes:
        arm: The winner.
        ratio: Speed over that of vLLM alone, all tokens over all seconds, the prompts' own passes included.
        batch_ratios: The same of each batch of prompts.
        num_identical: Answers with the same tokens as vLLM alone.
        num_answers: Answers.
    """

    arm: Arm
    ratio: float
    batch_ratios: tuple[float, ...]
    num_identical: int
    num_answers: int

    @property
    def interval(self) -> tuple[float, float]:
        """Where the ratio lies with 95 % certainty."""
        return interval(self.batch_ratios)

    @property
    def pays(self) -> bool:
        """Whether it is faster than vLLM alone beyond chance."""
        return self.ratio > 1.0 and self.interval[0] > 1.0

    @property
    def acceptance(self) -> str:
        """Its rule."""
        assert self.arm.prediction is not None
        return self.arm.prediction.acceptance


@dataclass
class Findings:
    """Everything one run measured.

    Attributes:
        setting: What all engines shared.
        drafts: The grid.
        verdicts: The winners, one for each rule.
        arms: The comparison, vLLM alone first.
    """

    setting: TuningSetting
    drafts: list[MeasuredDraft] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    arms: list[Arm] = field(default_factory=list)


def judge(arms: Sequence[Arm]) -> list[Verdict]:
    """Judges the winners against vLLM alone.

    Args:
        arms: vLLM alone first, each with its answers to the same batches.

    Returns:
        One verdict for each winner.
    """
    alone = arms[0]
    verdicts = []
    for arm in arms[1:]:
        pairs = list(zip(arm.answers, alone.answers, strict=True))
        same = [
            one == other
            for answer, alone_answer in pairs
            for one, other in zip(answer.token_ids, alone_answer.token_ids, strict=True)
        ]
        ratios = tuple(_speed([answer]) / _speed([alone_answer]) for answer, alone_answer in pairs)
        verdicts.append(Verdict(arm, _speed(arm.answers) / _speed(alone.answers), ratios, sum(same), len(same)))
    return verdicts


def _speed(answers: Sequence[Answers]) -> float:
    """Tokens per second."""
    return sum(answer.num_tokens for answer in answers) / sum(answer.seconds for answer in answers)


def format_table(drafts: Sequence[MeasuredDraft], max_kernel_size: int) -> str:
    """The grid as text: costs of each draft, and the best prediction under each rule.

    Args:
        drafts: The grid.
        max_kernel_size: The kernel size it was measured with.

    Returns:
        Lines for a terminal of 110 columns.
    """
    header = f"{'draft':24}{'draft cost':>11}{f'verifying {max_kernel_size}':>14}"
    header += "".join(f"{f'predicted, {RULE_TITLES[rule]}':>30}" for rule in RULES)
    lines = [header, "-" * len(header)]
    for measured in drafts:
        if measured.refused:
            lines.append(f"{measured.draft.title:24}{'left out':>11}")
            continue
        longest = measured.predictions[RULES[0]][-1]
        line = f"{measured.draft.title:24}{longest.draft_cost:>11.2f}{longest.verify_cost:>14.2f}"
        for rule in RULES:
            found = best(measured.predictions[rule])
            cell = f"{found.speedup:.2f}x at {found.kernel_size} (accepts {found.acceptance_length:.1f})"
            line += f"{cell:>30}"
        lines.append(line)
    lines.append(
        "Costs in one-token steps of vLLM alone; 'at' is the kernel size, 'accepts' the mean tokens per verification pass at it. "
        f"Where the default draft is within {PREDICTION_ERROR:.0%} of the best, it is the one that is put to the test."
    )
    return "\n".join(lines)


def format_verdict(verdict: Verdict, options: TuningOptions) -> str:
    """What a winner is worth, in sentences.

    Args:
        verdict: The winner.
        options: What the user asked for.

    Returns:
        A few lines.
    """
    prediction = verdict.arm.prediction
    assert prediction is not None
    file = options.output_file(verdict.acceptance)
    config = verdict.arm.speculative_config
    how = "with adaptive lengths" if config["adaptive"] else "with it"
    spread = f"{min(verdict.batch_ratios):.2f} to {max(verdict.batch_ratios):.2f} over the prompts"
    spread += f"; with 95 % certainty {format_interval(verdict.interval)}"
    text = (
        f"Best {RULE_TITLES[verdict.acceptance]}: {prediction.draft.title}. Predicted {prediction.speedup:.2f}x at a fixed "
        f"kernel size of {prediction.kernel_size}, measured {verdict.ratio:.2f}x {how} ({spread}); {verdict.num_identical} of "
        f"{verdict.num_answers} answers are those of vLLM alone.\n"
    )
    if verdict.pays:
        return text + (
            f"  Written to {file}. Serve with: vllm serve {options.model} --speculative-config \"$(cat '{file}')\" "
            "--max-model-len 4096 --kv-cache-memory-bytes 1G (the KV cache; else vLLM's CPU build takes most of the memory)"
        )
    if verdict.ratio < 1.0:
        text += "  This is slower than vLLM alone, so no file is written: do not use Sirius with this rule here."
    else:
        text += "  This may be chance, so no file is written: measure with more prompts (--num-prompts)."
    if file.exists():
        text += f" {file} is from an earlier run."
    return text


def recommend(verdicts: Sequence[Verdict]) -> str:
    """What to use, and why: of settings that cannot be told apart the safer one, which is lossless, which is the default.

    Args:
        verdicts: The winners, lossless first.

    Returns:
        A few sentences.
    """
    paying = [verdict for verdict in verdicts if verdict.pays]
    if not paying and all(verdict.ratio < 1.0 for verdict in verdicts):
        return "Recommended: vLLM alone. Every setting was slower on these prompts."
    if not paying:
        return (
            "No clear winner: no setting is faster than vLLM alone beyond chance. Recommended: vLLM alone, or the default "
            "settings (lossless, adaptive), which keep the model's own output and stop drafting where that does not pay. "
            "More prompts (--num-prompts) or a quieter machine may tell them apart."
        )
    first = paying[0]
    if len(paying) == 1:
        return (
            f"Recommended: {RULE_TITLES[first.acceptance]}, the only rule that is faster than vLLM alone beyond chance."
        )
    second = paying[1]
    ends = interval([other / one for one, other in zip(first.batch_ratios, second.batch_ratios, strict=True)])
    names = RULE_TITLES[first.acceptance], RULE_TITLES[second.acceptance]
    over = f"{names[1]} over {names[0]}: with 95 % certainty {format_interval(ends)}"
    if ends[0] <= 1.0 <= ends[1]:
        return f"No clear winner ({over}). Recommended: {names[0]}, because it keeps the model's own output."
    if ends[1] < 1.0:
        return f"Recommended: {names[0]}, which is faster ({over}) and keeps the model's own output."
    return f"Recommended: {names[0]}, which keeps the model's own output; {names[1]} is faster ({over}) but lossy."


def format_findings(findings: Findings) -> str:
    """Table and verdicts as text.

    Args:
        findings: What was measured.

    Returns:
        Lines for standard output.
    """
    options = findings.setting.options
    conditions = "\n".join(filter(None, [findings.setting.conditions, findings.setting.why_these_prompts]))
    parts = [conditions, format_table(findings.drafts, options.max_kernel_size)]
    if findings.setting.inspection.no_low_bit:
        parts.append(f"Drafts in int8 and int4 are left out: {findings.setting.inspection.no_low_bit}.")
    parts += [
        f"{measured.draft.title} is left out: {measured.refused}" for measured in findings.drafts if measured.refused
    ]
    parts += [format_verdict(verdict, options) for verdict in findings.verdicts]
    parts.append(recommend(findings.verdicts))
    parts.append(
        "Predictions are of decoding alone; measured speed includes the prompts' own passes. A threshold is lossy: tokens "
        "pass that vLLM alone would not choose. Lossless differs by rounding only."
    )
    return "\n\n".join(parts)


def write_files(findings: Findings) -> None:
    """Writes the settings that pay, and the report if it is wanted.

    Args:
        findings: What was measured.
    """
    options = findings.setting.options
    for verdict in findings.verdicts:
        if verdict.pays:
            settings = json.dumps(verdict.arm.speculative_config, indent=2)
            options.output_file(verdict.acceptance).write_text(settings + "\n")
    if options.report is not None:
        options.report.write_text(json.dumps(as_json(findings), indent=2) + "\n")


def as_json(findings: Findings) -> dict[str, Any]:
    """Everything measured, for a file.

    Args:
        findings: What was measured.

    Returns:
        JSON values.
    """
    setting = findings.setting
    return {
        "provenance": {
            "model": setting.name,
            "prompts": {
                "source": setting.source,
                "in_file": setting.num_in_file,
                "tokens": [len(ids) for batch in setting.batches for ids in batch],
            },
            "sampling": {"temperature": 0.0, "max_tokens": setting.options.max_tokens},
            "engine": {key: value for key, value in setting.engine.items() if key != "model"},
            "max_kernel_size": setting.options.max_kernel_size,
            "inspection": asdict(setting.inspection),
            **describe_machine(),
        },
        "drafts": [_draft_as_json(measured) for measured in findings.drafts],
        "comparison": [_arm_as_json(arm) for arm in findings.arms],
        "winners": [_verdict_as_json(verdict) for verdict in findings.verdicts],
    }


def _draft_as_json(measured: MeasuredDraft) -> dict[str, Any]:
    return {
        "title": measured.draft.title,
        "options": measured.draft.options,
        "start_up_line": measured.start_up_line,
        "refused": measured.refused,
        "costs": measured.costs.as_dict() if measured.costs is not None else None,
        "counts": {rule: asdict(counts) for rule, counts in measured.counts.items()},
        "predictions": {rule: [p.as_json() for p in found] for rule, found in measured.predictions.items()},
    }


def _arm_as_json(arm: Arm) -> dict[str, Any]:
    answers = [
        {"tokens": answer.num_tokens, **{key: value for key, value in asdict(answer).items() if key != "token_ids"}}
        for answer in arm.answers
    ]
    return {"title": arm.title, "speculative_config": arm.speculative_config, "answers": answers}


def _verdict_as_json(verdict: Verdict) -> dict[str, Any]:
    assert verdict.arm.prediction is not None
    return {
        "acceptance": verdict.acceptance,
        "speculative_config": verdict.arm.speculative_config,
        "prediction": verdict.arm.prediction.as_json(),
        "measured_ratio": verdict.ratio,
        "batch_ratios": verdict.batch_ratios,
        "interval": [None if math.isinf(end) else end for end in verdict.interval],
        "identical_answers": verdict.num_identical,
        "answers": verdict.num_answers,
        "pays": verdict.pays,
    }
