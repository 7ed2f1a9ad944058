"""The file of a run, the same for engines, servers and `vllm bench latency`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError

FILE = "results.json"

MEASURED = "measured"
NOT_INSTALLED = "not installed"
FAILED = "failed"


@dataclass(frozen=True)
class Record:
    """What one arm did in one turn.

    Attributes:
        arm: The arm.
        task: Data set of the prompts.
        batch: Prompts answered together; for servers, most requests at a time.
        repeat: Number of the repeat, from 0.
        engine_group: Number of the group of engines that were loaded side by side, from 0.
        tokens: Generated tokens of all prompts.
        seconds: Wall time, processing of the prompts included.
        prompts: Places of the prompts in the data set; empty for prompts of random tokens.
        num_drafts: Passes of the target that had draft tokens to judge.
        num_draft_tokens: Draft tokens judged.
        num_accepted_tokens: Draft tokens accepted.
        accepted_by_position: Drafts whose token at each position was accepted.
        token_ids: Generated tokens of each prompt; empty where only texts are known.
        texts: Text of each answer, where tokens are not known.
        correct: Whether each answer is right; empty where nothing was scored.
        details: More figures of the program that measured.
    """

    arm: str
    task: str
    batch: int
    repeat: int
    engine_group: int
    tokens: int
    seconds: float
    prompts: list[int] = field(default_factory=list)
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[Any]:
        """What can be compared with another arm's answers: tokens where they are known, texts otherwise."""
        return self.token_ids or self.texts


@dataclass
class Result:
    """Everything that a run knows.

    Attributes:
        provenance: Where the numbers come from.
        arms: What is known of each arm: its options, status, start-up line, memory.
        records: The measurements.
    """

    provenance: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    records: list[Record] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes the file; a reader sees the old one or the new one, never a part.

        Args:
            path: JSON file, with one record per line.
        """
        header = json.dumps({"provenance": self.provenance, "arms": self.arms}, indent=2)
        lines = ",\n".join(json.dumps({k: v for k, v in asdict(r).items() if v not in ([], {})}) for r in self.records)
        partial = path.with_suffix(".partial")
        partial.write_text(
            f'{header.removesuffix("}").rstrip()},\n  "records": [\n{lines}\n  ]\n}}\n', encoding="utf-8"
        )
        partial.replace(path)


def read(path: Path) -> Result:
    """Reads the file of a run.

    Args:
        path: The file, or the folder of the run.

    Returns:
        What it holds.

    Raises:
        BenchmarkError: If there is no such file, or it is not a run's.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise BenchmarkError(f"{path}: there is no such file; give a run's folder or its {FILE}")
    known = {each.name for each in fields(Record)}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        records = [Record(**{k: v for k, v in record.items() if k in known}) for record in found["records"]]
        return Result(found["provenance"], found["arms"], records)
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{file}: not the file of a run ({error}); give one that a benchmark wrote") from error
