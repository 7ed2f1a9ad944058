"""The report of `vllm-sirius doctor` on the environment, and its repairs. As a program: the repairs alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from vllm_sirius.environment.checks import (
    CPU_BUILD,
    check_breaking_packages,
    check_name,
    check_vllm,
    examine,
    installed_version,
)
from vllm_sirius.environment.findings import Finding, RepairError
from vllm_sirius.errors import ModelError

Say = Callable[[str], None]


def diagnose(fix: bool, say: Say) -> list[Finding]:
    """Looks at the environment, and repairs what can be repaired.

    Args:
        fix: Whether to repair.
        say: Takes a line for the user before and after every change.

    Returns:
        The findings, after the repairs.
    """
    if fix:
        repair(say)
        importlib.invalidate_caches()
    return examine()


def repair(say: Say) -> bool:
    """Repairs what can be repaired; a second call finds nothing to do.

    Args:
        say: Takes a line for the user before and after every change.

    Returns:
        Whether every repair succeeded.
    """
    if installed_version(CPU_BUILD) is None:
        return True
    succeeded = True
    for finding in [check_name(), *check_breaking_packages()]:
        if finding.repair is None:
            continue
        say(f"{finding.part}: {finding.text}")
        say(f"repairing: {finding.repair.announcement} ...")
        try:
            finding.repair.run()
        except RepairError as error:
            succeeded = False
            say(f"error: {error}")
    return succeeded


def require_vllm() -> None:
    """Refuses to go on without the right vLLM; looks at nothing else, which takes no time.

    Raises:
        ModelError: Naming the remedy.
    """
    finding = check_vllm()
    if finding.state == "wrong":
        raise ModelError(f"{finding.text}: {finding.remedy}; `vllm-sirius doctor` says what else is missing")


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings as text: one line each, the remedy below, the verdict last.

    Args:
        findings: The findings.

    Returns:
        Lines for a terminal.
    """
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:7} {finding.part}: {finding.text}")
        if finding.remedy:
            lines.append(f"{'':7}   -> {finding.remedy}")
    return "\n".join([*lines, _verdict(findings)])


def is_sound(findings: Sequence[Finding]) -> bool:
    """Whether nothing is wrong; advice does not count."""
    return all(finding.state != "wrong" for finding in findings)


def _verdict(findings: Sequence[Finding]) -> str:
    wrong = [finding for finding in findings if finding.state == "wrong"]
    if not wrong:
        return "vLLM runs here with Sirius."
    repairable = sum(finding.repair is not None for finding in wrong)
    start = f"{len(wrong)} {'thing is' if len(wrong) == 1 else 'things are'} wrong"
    return f"{start}; `vllm-sirius doctor --fix` repairs {repairable}." if repairable else f"{start}."


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(0 if repair(_write) else 1)
