"""Real vLLM engines in a process of their own, driven by tests.

An engine leaves global state behind (thread binding, distributed groups, compiled graphs), so tests never build one in
pytest's process. `EngineHost` starts one child that builds engines one after the other, in-process (no engine core of its
own), which lets probes read the model runner, its modules and its KV pages.

The child is `engine_child`, forked from a process that has imported vLLM (`fork_server`); commands and answers are JSON lines
on its standard input and output. Model Runner V2 needs Triton: its kernels run in Triton's interpreter (`v2_on_cpu`), which
makes a step of a model of many words cost most of a second.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from support.fork_server import ForkServer

TESTS = Path(__file__).resolve().parent.parent

ANSWER_SECONDS = 1200
"""Longer than any engine takes to start and answer; what hangs must not hang the suite."""

Runner = Literal["v1", "v2"]
"""vLLM's model runner of a process."""

EXACT_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee", "VLLM_FLOAT32_MATMUL_PRECISION": "highest"}
"""On a GPU products of float32 would be rounded to TF32, Triton's by default, and no two shapes of a batch would agree."""


def runner_environment(runner: Runner) -> dict[str, str]:
    """Variables that make vLLM's CPU build use a model runner, and find the tests' and the project's modules."""
    folders = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    if runner == "v2":
        folders.insert(0, str(TESTS / "support" / "v2_on_cpu"))
    return {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2")), "PYTHONPATH": os.pathsep.join(folders)}


class EngineError(AssertionError):
    """The child reported an exception; the text is its type and message."""


@dataclass(frozen=True)
class Completion:
    """One answer: token ids, text, why it ended, and log probabilities of its tokens if asked for."""

    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: Any
    logprobs: list[float] | None


@dataclass(frozen=True)
class Generation:
    """Answers of one call, and what vLLM counted of its speculation meanwhile."""

    completions: list[Completion]
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def token_ids(self) -> list[list[int]]:
        return [completion.token_ids for completion in self.completions]

    @property
    def acceptance_length(self) -> float:
        return 1 + self.num_accepted_tokens / self.num_drafts


class Child:
    """A forked process that answers commands (`engine_child`).

    Args:
        environment: All its variables, which it gets after vLLM was imported; see `fork_server`.
        server: Variables of the server it is forked from, if they are others.
    """

    def __init__(self, environment: dict[str, str], server: dict[str, str] | None = None) -> None:
        # Not above: files with probes import this one in processes that must hold no module of the plugin.
        from vllm_sirius.measuring.conversation import Conversation

        child_reads, commands = (os.fdopen(handle, mode) for handle, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
        answers, child_writes = (os.fdopen(handle, mode) for handle, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
        self._conversation = Conversation(commands, answers)
        with child_reads, child_writes:
            forking = ForkServer.of(server or environment)
            self._child = forking.spawn(environment, child_reads.fileno(), child_writes.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child."""
        self._conversation.close()
        self._child.wait(timeout=60)

    def call(self, function: str, *arguments: Any) -> Any:
        """Calls ``function(*arguments)`` in the child.

        Args:
            function: ``"path:name"``, by path of a Python file.
            arguments: JSON values.
        """
        return self._ask({"do": "call", "function": function, "arguments": arguments})["value"]

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        answer = self._conversation.ask(command, ANSWER_SECONDS)
        if answer is None:
            raise EngineError(f"the engine's process ended with status {self._child.wait(timeout=60)}")
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer


class EngineHost(Child):
    """A child process with at most one engine at a time.

    Args:
        environment: Variables added to the child's environment, which it gets after vLLM was imported.
        runner: Model runner of the child's engines.
    """

    def __init__(self, environment: dict[str, str] | None = None, runner: Runner = "v1") -> None:
        self.runner = runner
        variables = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            **EXACT_FLOAT32,
            **runner_environment(runner),
        }
        super().__init__({**variables, **(environment or {})}, server=variables)

    def generate(
        self,
        engine: dict[str, Any],
        prompts: Sequence[list[int] | str],
        sampling: dict[str, Any] | Sequence[dict[str, Any]],
    ) -> Generation:
        """Generates with an engine, which is built if the last one had other options.

        Args:
            engine: Arguments of `vllm.LLM`.
            prompts: Token ids or texts.
            sampling: Arguments of `vllm.SamplingParams`, for all prompts or one for each; temperature 0 unless given.
        """
        answer = self._ask({"do": "generate", "engine": engine, "prompts": list(prompts), "sampling": sampling})
        completions = [Completion(**completion) for completion in answer.pop("completions")]
        return Generation(completions, **answer)

    def probe(self, engine: dict[str, Any], function: str, **arguments: Any) -> Any:
        """Calls ``function(llm, **arguments)`` in the child.

        Args:
            engine: Arguments of `vllm.LLM`.
            function: ``"module:name"``, importable from the tests folder.
            arguments: JSON values.
        """
        return self._ask({"do": "probe", "engine": engine, "function": function, "arguments": arguments})["value"]

    def probe_config(self, engine: dict[str, Any]) -> str | None:
        """Builds the engine's config only; returns the message of the error it raised, or ``None``."""
        answer: str | None = self._ask({"do": "probe_config", "engine": engine})["value"]
        return answer

    def probe_static(self, function: str, **arguments: Any) -> Any:
        """Calls ``function(**arguments)`` in the child, without an engine."""
        return self._ask({"do": "probe_static", "function": function, "arguments": arguments})["value"]
