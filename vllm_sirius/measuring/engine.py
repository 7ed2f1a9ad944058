"""One vLLM engine in a process of its own: `Engine` drives it, and this module run as a program is it.

Engines stay alive side by side, so that the arms of the comparison take turns under the same conditions. Commands and
answers are JSON lines on the child's standard input and output; everything vLLM prints goes to a log file.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sirius.errors import one_line
from vllm_sirius.measuring.child import child_environment, python_command
from vllm_sirius.measuring.conversation import Conversation, answering_stream

START_SECONDS = 900
GENERATE_SECONDS = 600
CLOSE_SECONDS = 30
ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception)\b.*")


class EngineError(Exception):
    """An engine did not start or stopped answering; the text has the reason and the path of its log."""


@dataclass(frozen=True)
class Answers:
    """What an engine gave for one batch of prompts.

    Attributes:
        token_ids: The generated tokens of each prompt.
        seconds: Wall time of `LLM.generate`, processing of the prompts included.
        num_drafts: Verification passes that had draft tokens to judge.
        num_draft_tokens: Draft tokens judged.
        num_accepted_tokens: Draft tokens accepted.
        accepted_by_position: Drafts whose token at each position was accepted.
    """

    token_ids: list[list[int]]
    seconds: float
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_by_position: list[int]

    @property
    def num_tokens(self) -> int:
        """Generated tokens of all prompts together."""
        return sum(len(token_ids) for token_ids in self.token_ids)


class Engine:
    """A child process with one vLLM engine.

    Args:
        options: Arguments of `vllm.LLM`.
        log: File that takes what the child prints.
        checkout: A folder with another copy of the project, whose engine it is.
        prefix: Words before the child's command: of a program that runs it, for example in a control group.
        answer_seconds: Longest wait for an answer.
    """

    def __init__(
        self,
        options: dict[str, Any],
        log: Path,
        checkout: Path | None = None,
        *,
        prefix: Sequence[str] = (),
        answer_seconds: float = GENERATE_SECONDS,
    ) -> None:
        self._log = log
        self._answer_seconds = answer_seconds
        variables = child_environment(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_LOGGING_STREAM="ext://sys.stderr",
            TOKENIZERS_PARALLELISM="false",
        )
        with log.open("wb") as stderr:
            self._child = subprocess.Popen(
                [*prefix, *python_command(__name__, checkout=checkout)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=variables,
            )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._conversation = Conversation(self._child.stdin, self._child.stdout)
        try:
            self._ask({"engine": options}, max(START_SECONDS, answer_seconds))
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        each: Sequence[Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> Answers:
        """Answers prompts, greedily unless told otherwise, as one batch.

        Args:
            prompts: Token ids of each prompt.
            max_tokens: Most tokens to generate for each.
            each: What a prompt adds to `sampling`, by prompt.
            **sampling: More of vLLM's `SamplingParams`.

        Returns:
            The answers.

        Raises:
            EngineError: If the engine stopped.
        """
        shared = {"temperature": 0.0, **sampling, "max_tokens": max_tokens}
        params = [{**shared, **own} for own in each or [{}] * len(prompts)]
        command = {"prompts": [list(prompt) for prompt in prompts], "sampling": params}
        return Answers(**self._ask(command, self._answer_seconds))

    def costs(self) -> dict[str, dict[str, float]]:
        """Lets an engine of Sirius time its own steps.

        Returns:
            ``draft_seconds`` by rows and ``target_seconds`` by tokens.

        Raises:
            EngineError: If it cannot; it still answers prompts.
        """
        costs: dict[str, dict[str, float]] = self._ask({"costs": True}, GENERATE_SECONDS)["costs"]
        return costs

    def start_up_line(self) -> str:
        """What Sirius said when the engine started; empty without Sirius."""
        lines = [
            line
            for line in self._log.read_text(errors="replace").splitlines()
            if "Sirius: " in line and "gated FFNs" in line
        ]
        return lines[-1].partition("Sirius: ")[2].strip() if lines else ""

    def close(self) -> None:
        """Ends the child."""
        self._conversation.hang_up()
        try:
            self._child.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._conversation.close()

    def _ask(self, command: dict[str, Any], seconds: float) -> dict[str, Any]:
        try:
            answer = self._conversation.ask(command, seconds)
        except TimeoutError as error:
            raise EngineError(f"the engine gave no answer in time; its log is {self._log}") from error
        if answer is None:
            raise EngineError(self._reason())
        if "error" in answer:
            raise EngineError(f"{answer['error']} (its log is {self._log})")
        return answer

    def _reason(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if ERROR_LINE.match(line)]
        reason = errors[-1] if errors else "its process ended without a message"
        return f"the engine stopped: {reason}\nIts log is {self._log}"


def _serve() -> None:
    """The child: builds the engine, then carries out commands until its input ends."""
    answers = answering_stream()
    try:
        for answer in _answers():
            answers.write(json.dumps(answer) + "\n")
    except Exception as error:
        # The asking process cannot tell the reason from the log's other lines; vLLM's own may have several.
        answers.write(json.dumps({"error": one_line(error)}) + "\n")
        raise


def _answers() -> Iterator[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    from vllm_sirius.metrics import read_counts

    llm = LLM(**json.loads(sys.stdin.readline())["engine"])
    yield {}
    for line in sys.stdin:
        command = json.loads(line)
        if "costs" in command:
            yield _costs(llm)
            continue
        prompts = [{"prompt_token_ids": token_ids} for token_ids in command["prompts"]]
        params = [SamplingParams(**sampling) for sampling in command["sampling"]]
        before = read_counts(llm.get_metrics())
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        counts = read_counts(llm.get_metrics()).since(before)
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        yield {"token_ids": token_ids, "seconds": seconds, **vars(counts)}


def _costs(llm: Any) -> dict[str, Any]:
    from vllm_sirius.integration.measure_costs import costs_of_worker

    try:
        return {"costs": llm.collective_rpc(costs_of_worker)[0]}
    except Exception as error:  # noqa: BLE001 - the asking process decides what a missing measurement means
        return {"error": f"its steps cannot be timed: {one_line(error)}"}


if __name__ == "__main__":
    _serve()
