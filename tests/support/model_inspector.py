"""A forked process that tells vLLM what a model's class can do.

vLLM asks another Python for it, which imports vLLM anew: ten seconds for each class that this user's cache does not know yet. A
fork of a process that has imported vLLM does the same in a moment. It is made before any engine starts threads.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO


class ModelInspector:
    """The fork, which ends with the block or with this process."""

    def __init__(self) -> None:
        questions, ask = os.pipe()
        answers, answer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(ask)
            os.close(answers)
            os.dup2(2, 1)  # the parent's answers are nobody else's
            try:
                _inspect(os.fdopen(questions, "rb"), os.fdopen(answer, "wb"))
            finally:
                os._exit(0)
        os.close(questions)
        os.close(answer)
        self._ask, self._answers = os.fdopen(ask, "wb"), os.fdopen(answers, "rb")

    def __enter__(self) -> ModelInspector:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ask.close()
        self._answers.close()
        os.waitpid(self._pid, 0)

    def replace_vllms(self) -> None:
        """Lets vLLM ask here instead of another Python."""
        from vllm.model_executor.models import registry

        registry._run_in_subprocess = self.run

    def run(self, function: Callable[[], Any]) -> Any:
        """What a function returns there."""
        import cloudpickle

        cloudpickle.dump(function, self._ask)
        self._ask.flush()
        result, fault = pickle.load(self._answers)
        if fault:
            raise RuntimeError(f"Error raised in subprocess:\n{fault}")
        return result


def _inspect(questions: BinaryIO, answers: BinaryIO) -> None:
    from vllm.plugins import load_general_plugins

    while True:
        try:
            function = pickle.load(questions)
        except EOFError:
            return
        try:
            load_general_plugins()
            answer = function(), ""
        except Exception:  # noqa: BLE001 - vLLM's to judge, as where it asks another Python
            answer = None, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()
