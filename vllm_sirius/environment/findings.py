"""What can be said about one part of the environment. Leaf module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ok", "advice", "wrong"]
"""``advice`` costs speed, ``wrong`` keeps vLLM with Sirius from running."""


@dataclass(frozen=True)
class Repair:
    """How a finding can be put right.

    Attributes:
        announcement: What will be done, for the user.
        run: Does it; raises `RepairError`.
    """

    announcement: str
    run: Callable[[], None]


class RepairError(Exception):
    """A repair failed; the text has the reason and what to do instead."""


@dataclass(frozen=True)
class Finding:
    """One part of the environment.

    Attributes:
        part: Its name.
        state: How it is.
        text: What was found.
        remedy: What the user can do; empty where nothing needs to be done.
        repair: How ``--fix`` puts it right, or ``None``.
    """

    part: str
    state: State
    text: str
    remedy: str = ""
    repair: Repair | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "part": self.part,
            "state": self.state,
            "text": self.text,
            "remedy": self.remedy,
            "repairable": self.repair is not None,
        }
