"""A model of which `accelerate` leaves on the disk what does not fit: both ends of a child process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.offload.answering import AnsweringError
from vllm_sirius.errors import one_line
from vllm_sirius.measuring.child import child_environment
from vllm_sirius.measuring.conversation import Conversation, answering_stream
from vllm_sirius.measuring.engine import Answers

CLOSE_SECONDS = 30
ROOT = Path(__file__).resolve().parents[2]


def missing() -> str:
    """What is not installed; empty where nothing is missing."""
    return "" if importlib.util.find_spec("accelerate") else "the package accelerate is not installed"


class AccelerateModel:
    """The child from outside.

    Args:
        model: Folder of the checkpoint.
        weight_bytes: Memory for weights; the rest stays on the disk.
        threads: Threads of PyTorch.
        prefix: Words before the child's command.
        log: Takes what it prints.
        patience_seconds: Longest wait for an answer.

    Raises:
        AnsweringError: If it does not start.
    """

    def __init__(
        self, model: str, weight_bytes: int, threads: int, prefix: Sequence[str], log: Path, patience_seconds: float
    ) -> None:
        self._log, self._patience = log, patience_seconds
        question = {"model": model, "weight_bytes": weight_bytes, "threads": threads}
        command = [*prefix, sys.executable, "-P", "-m", "benchmarks.offload.accelerate_arm", json.dumps(question)]
        with log.open("wb") as stderr:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=child_environment(PYTHONPATH=str(ROOT), TOKENIZERS_PARALLELISM="false"),
            )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._conversation = Conversation(self._child.stdin, self._child.stdout)
        try:
            self._ask({})
        except BaseException:
            self.close()
            raise

    def answer(self, token_ids: Sequence[int], max_tokens: int) -> Answers:
        """Answers one prompt greedily.

        Args:
            token_ids: The prompt.
            max_tokens: Most tokens of the answer.
        """
        found = self._ask({"prompt": list(token_ids), "max_tokens": max_tokens})
        return Answers([found["token_ids"]], found["seconds"], 0, 0, 0, [])

    def close(self) -> None:
        """Ends the child."""
        self._conversation.hang_up()
        try:
            self._child.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._conversation.close()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._conversation.ask(command, self._patience)
        except TimeoutError as error:
            raise AnsweringError(
                f"accelerate gave no answer within {self._patience:.0f} s; its log is {self._log}"
            ) from error
        if answer is None:
            raise AnsweringError(f"accelerate's process ended; its log is {self._log}")
        if "error" in answer:
            raise AnsweringError(f"{answer['error']} (its log is {self._log})")
        return answer


def _serve() -> None:
    answers = answering_stream()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for answer in _answers(json.loads(sys.argv[1]), folder):
                answers.write(json.dumps(answer) + "\n")
    except Exception as error:
        answers.write(json.dumps({"error": one_line(error)}) + "\n")
        raise


def _answers(question: dict[str, Any], folder: str) -> Iterator[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(question["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        question["model"],
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": question["weight_bytes"]},
        offload_folder=folder,
    )
    for line in sys.stdin:
        command = json.loads(line)
        if not command:
            yield {}
            continue
        prompt = torch.tensor([command["prompt"]])
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=command["max_tokens"],
                do_sample=False,
                repetition_penalty=1.0,
            )
        seconds = time.perf_counter() - started
        yield {"token_ids": output[0, prompt.shape[1] :].tolist(), "seconds": seconds}


if __name__ == "__main__":
    _serve()
