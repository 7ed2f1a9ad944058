"""Memory of an engine's weights while they are loaded: `python -m benchmarks.offload.load_memory OPTIONS` is the engine.

It is looked at from inside, around the loading alone: what Python, PyTorch and vLLM take beside the weights is not in it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.offload.answering import AnsweringError
from vllm_sirius.measuring.child import child_environment
from vllm_sirius.measuring.conversation import answering_stream

POLL_SECONDS = 0.02
ROOT = Path(__file__).resolve().parents[2]


def measure(options: dict[str, Any], prefix: Sequence[str], log: Path) -> dict[str, int]:
    """Starts an engine in a process of its own and ends it.

    Args:
        options: Arguments of `vllm.LLM`, with ``offload: disk``.
        prefix: Words before its command.
        log: Takes what it prints.

    Returns:
        Bytes: ``plan`` for the weights, ``peak`` while they were loaded and ``after``, both beside what there was before.

    Raises:
        AnsweringError: If it does not start.
    """
    command = [*prefix, sys.executable, "-P", "-m", "benchmarks.offload.load_memory", json.dumps(options)]
    environment = child_environment(PYTHONPATH=str(ROOT), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    with log.open("wb") as stderr:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    if done.returncode:
        raise AnsweringError(f"the engine whose memory was to be measured did not start; its log is {log}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


class Watch:
    """Looks at the memory of this process until it is told to stop."""

    def __init__(self) -> None:
        self.before = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Ends it.

        Returns:
            What is taken now.
        """
        self._done.set()
        self._thread.join()
        return anonymous_bytes()

    def _look(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self.peak = max(self.peak, anonymous_bytes())


def _serve() -> None:
    answers = answering_stream()
    from vllm import LLM

    from vllm_sirius.integration import load_target
    from vllm_sirius.integration.offloaded_target import OffloadedTarget

    found: dict[str, int] = {}
    load, finish = load_target.load_target, OffloadedTarget.finish

    def loading(*args: Any, **kwargs: Any) -> Any:
        watch = Watch()
        loaded = load(*args, **kwargs)
        after = watch.stop()
        found.update(peak=max(watch.peak, after) - watch.before, after=after - watch.before)
        return loaded

    def finishing(self: OffloadedTarget) -> Any:
        found["plan"] = self.memory.memory_bytes
        return finish(self)

    # The model runners, which take them by name, are not imported before an engine starts.
    load_target.load_target = loading
    OffloadedTarget.finish = finishing  # type: ignore[method-assign]
    llm = LLM(**json.loads(sys.argv[1]))
    answers.write(json.dumps(found) + "\n")
    del llm


if __name__ == "__main__":
    _serve()
