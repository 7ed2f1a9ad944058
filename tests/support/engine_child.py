"""The process of `engine_host`: builds engines one after the other, generates, and runs probes.

Its parent has imported vLLM and nothing more (`fork_server`).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from support.model_inspector import ModelInspector

freeze, unfreeze = gc.freeze, gc.unfreeze
"""Python's own, which stand still while a child runs, see `main`."""


class EngineChild:
    """At most one engine at a time, and what can be asked of it."""

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

        What stays is what the engine imported, which is frozen; no engine is, see `main`.
        """
        from vllm.distributed import cleanup_dist_env_and_memory

        self.options = self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
        freeze()

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

    def call(self, command: dict[str, Any]) -> dict[str, Any]:
        path, _, name = command["function"].rpartition(":")
        sys.path.insert(0, str(Path(path).parent))
        return {"value": getattr(importlib.import_module(Path(path).stem), name)(*command["arguments"])}

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


def main() -> None:
    """Answers commands until there are no more.

    vLLM collects garbage a dozen times while it builds and ends an engine. What the parent imported is frozen, which makes
    that ten times faster; vLLM's servers freeze and thaw everything, so they are kept from it.
    """
    with ModelInspector() as inspector:
        inspector.replace_vllms()
        gc.freeze = gc.unfreeze = lambda: None
        # As `answering_stream` does, which is the plugin's: a process must be able to do without any of its modules.
        answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        child = EngineChild()
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = getattr(child, command.pop("do"))(command)
            except Exception as error:  # noqa: BLE001 - whatever the engine raises is the test's to judge
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
