"""Failures that the user of a benchmark can act on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from vllm_sirius.errors import SiriusError


class BenchmarkError(Exception):
    """A failure that the user can act on; its text is the whole message."""


def exit_status(program: Callable[[], int]) -> int:
    """Runs a program and turns what stopped it into one line and an exit status.

    Args:
        program: The program; returns its own exit status.

    Returns:
        The status: 1 after a `BenchmarkError` or one of Sirius's errors, 130 after an interruption.

    Raises:
        SystemExit: With status 143 if the process is told to end; engines and servers are ended first.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return program()
    except (BenchmarkError, SiriusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the rounds that were finished are kept", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
