"""Real vLLM engines in a process of their own, driven by tests.

An engine leaves global state behind (thread binding, distributed groups, compiled graphs), so tests never build one in
pytest's process. `EngineHost` starts one child that builds engines one after the other, in-process (no engine core of its
own), which lets probes read the model runner, its modules and its KV pages.

The child runs this file; commands and answers are JSON lines on its standard input and output. Model Runner V2 needs Triton:
its kernels run in Triton's interpreter (`v2_on_cpu`), which makes a step cost most of a second.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TESTS = Path(__file__).resolve().parent.parent

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


class EngineHost:
    """A child process with at most one engine at a time.

    Args:
        environment: Variables added to the child's environment.
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
            **(environment or {}),
        }
        self._child = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=variables,
            text=True,
        )

    def __enter__(self) -> EngineHost:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(timeout=60)

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

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(command) + "\n")
        self._child.stdin.flush()
        for line in self._child.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                if "error" in answer:
                    raise EngineError(answer["error"])
                return answer
        raise EngineError(f"the engine's process ended with status {self._child.wait(timeout=60)}")


class _Child:
    """The loop of the child process."""

    def __init__(self) -> None:
        self.options: dict[str, Any] | None = None
        self.llm: Any = None

    def engine(self, options: dict[str, Any]) -> Any:
        if options != self.options:
            self._drop()
            from vllm import LLM

            if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
                _spare_the_interpreter()

            defaults = {
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": 512,
                "max_num_seqs": 8,
                "kv_cache_memory_bytes": 256 << 20,
                "disable_log_stats": False,
                "enable_prefix_caching": False,
            }
            self.llm = LLM(**{**defaults, **options})
            self.options = options
        return self.llm

    def _drop(self) -> None:
        """Also after an engine that failed to start, which leaves its distributed groups behind.

        vLLM collects garbage a dozen times while it builds an engine. Freezing what is left of the last one, above all
        vLLM's modules, makes that several times faster; the clean-up unfreezes everything, so no engine stays in memory.
        """
        import gc

        from vllm.distributed import cleanup_dist_env_and_memory

        self.options = self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
        gc.freeze()

    def generate(self, command: dict[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams

        from vllm_sirius.metrics import read_counts

        llm = self.engine(command["engine"])
        given = command["sampling"]
        many = given if isinstance(given, list) else [given] * len(command["prompts"])
        params = [SamplingParams(**{"temperature": 0.0, **_structured(one)}) for one in many]
        prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in command["prompts"]]
        before = read_counts(llm.get_metrics())
        outputs = llm.generate(prompts, params, use_tqdm=False)
        counts = read_counts(llm.get_metrics()).since(before)
        completions = []
        for output in outputs:
            first = output.outputs[0]
            logprobs = None
            if first.logprobs is not None:
                logprobs = [row[t].logprob for row, t in zip(first.logprobs, first.token_ids, strict=True)]
            completions.append(
                {
                    "token_ids": list(first.token_ids),
                    "text": first.text,
                    "finish_reason": first.finish_reason,
                    "stop_reason": first.stop_reason,
                    "logprobs": logprobs,
                }
            )
        return {
            "completions": completions,
            "num_drafts": counts.num_drafts,
            "num_draft_tokens": counts.num_draft_tokens,
            "num_accepted_tokens": counts.num_accepted_tokens,
        }

    def probe(self, command: dict[str, Any]) -> dict[str, Any]:
        module, _, name = command["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        return {"value": function(self.engine(command["engine"]), **command["arguments"])}

    def probe_static(self, command: dict[str, Any]) -> dict[str, Any]:
        module, _, name = command["function"].partition(":")
        return {"value": getattr(importlib.import_module(module), name)(**command["arguments"])}

    def probe_config(self, command: dict[str, Any]) -> dict[str, Any]:
        from vllm.engine.arg_utils import EngineArgs

        try:
            EngineArgs(**command["engine"]).create_engine_config()
        except ValueError as error:
            return {"value": str(error)}
        return {"value": None}


def _spare_the_interpreter() -> None:
    """Top-k and top-p by PyTorch: vLLM's kernel for them loops in a way that Triton's interpreter does not know."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


def _structured(sampling: dict[str, Any]) -> dict[str, Any]:
    """Lets JSON name a grammar: ``{"structured_outputs": {"json": ...}}``."""
    if "structured_outputs" not in sampling:
        return sampling
    from vllm.sampling_params import StructuredOutputsParams

    return {**sampling, "structured_outputs": StructuredOutputsParams(**sampling["structured_outputs"])}


def _main() -> None:
    child = _Child()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(child, command.pop("do"))(command)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises is the test's to judge
            answer = {"error": f"{type(error).__name__}: {error}"}
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
