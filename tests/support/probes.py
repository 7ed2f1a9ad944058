"""What tests look at inside an engine. Runs in the child of `engine_host`, on Model Runner V1 and V2."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from typing import Any

import torch

from support.engine_child import unfreeze
from vllm_sirius.drafting.prompt_lookup import PromptLookup
from vllm_sirius.integration.scheduler import LiveLookup
from vllm_sirius.pacing.batch_length import BatchLength
from vllm_sirius.pacing.costs import ENOUGH, CostCurve, StepCosts
from vllm_sirius.pacing.policy import DraftPolicy


def model_runner(llm: Any) -> Any:
    """The model runner of an in-process engine."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def is_v2(runner: Any) -> bool:
    """Whether it is Model Runner V2, which keeps its requests in a table of slots."""
    return hasattr(runner, "req_states")


def describe(llm: Any) -> dict[str, Any]:
    """Classes that the engine is made of, to see what the plugin changed."""
    runner = model_runner(llm)
    config = llm.llm_engine.vllm_config
    parts = ("drafter", "speculator", "rejection_sampler", "model_state")
    return {
        "worker": config.parallel_config.worker_cls,
        "runner": type(runner).__qualname__,
        "runner_module": type(runner).__module__,
        "parts": {name: type(getattr(runner, name, None)).__qualname__ for name in parts},
        "lookahead": config.num_lookahead_tokens,
        "modules": sorted({type(module).__qualname__ for module in runner.model.modules()}),
        "parameters": sum(1 for _ in runner.model.parameters()),
        "compilation_mode": int(config.compilation_config.mode),
    }


def draft_report(llm: Any) -> dict[str, Any]:
    """What the drafter of an engine found and keeps."""
    runner = model_runner(llm)
    drafter = runner.speculator if is_v2(runner) else runner.drafter
    resolved = runner.speculative_config.resolved.config
    return {
        "runner": "v2" if is_v2(runner) else "v1",
        "ffns": [ffn.name for ffn in drafter.ffns.ffns],
        "neurons": [ffn.num_neurons for ffn in drafter.ffns.ffns],
        "native": drafter.ffns.backend is not None,
        "row_bytes": drafter.ffns.backend.num_bytes if drafter.ffns.backend is not None else 0,
        "requests": len(runner.req_states.req_id_to_index if is_v2(runner) else drafter.requests),
        "draft_calls": drafter.ffns.num_draft_calls,
        "draft": (resolved.sparsity, resolved.draft_weights),
    }


def fix_costs(llm: Any, draft: float) -> dict[str, Any]:
    """Makes the adaptive length of an engine (Model Runner V1) sure of a draft cost, in target steps of one token."""
    runner = model_runner(llm)
    costs = StepCosts({1: draft, 32: draft}, {1: 1.0, 64: 2.0})
    for _ in range(ENOUGH):
        for size in range(1, runner.scheduler_config.max_num_seqs + 1):
            costs.target.observe(size, costs.target.seconds(size))
    costs.draft.observe = costs.target.observe = lambda size, seconds: None
    runner.drafter.policy = DraftPolicy(costs)
    runner.drafter.policy.observe_step = lambda *step: None
    return costs.as_dict()


def fix_prompt_lookup(llm: Any, most: int) -> None:
    """Makes an engine (Model Runner V1) take all candidates it finds up to so many tokens, as if they cost nothing."""
    model_runner(llm).drafter.lookup = PromptLookup(CostCurve({1: 1.0, 32: 1.0}), most)


class _FixedBatchLength(BatchLength):
    """Takes every step to last as long as a step of one token and a hundredth for every token that it drafts."""

    def observe_step(self, num_rows: int, length: int, seconds: float) -> None:
        super().observe_step(num_rows, length, 1.0 + length / 100.0)


class _CountingPromptLookup(PromptLookup):
    """Takes all candidates it finds, as if they cost nothing, and counts them."""

    def __init__(self, most: int) -> None:
        super().__init__(CostCurve({1: 1.0, 32: 1.0}), most)
        self.num_taken = 0

    def propose(self, *arguments: Any) -> Any:
        found = super().propose(*arguments)
        self.num_taken += sum(candidates.num_taken for candidates in found)
        return found


def make_drafts_pay(llm: Any) -> dict[str, Any]:
    """Lets an engine draft and look candidates up whatever else its machine does: lengths still adapt, at costs that are made up.

    Returns:
        What the options came to.
    """
    runner = model_runner(llm)
    config = runner.speculative_config.resolved.config
    if is_v2(runner):
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.draft_lengths = _FixedBatchLength(scheduler.vllm_config.speculative_config.adaptive_lengths)
        scheduler.dynamic_sd_lookup = LiveLookup(scheduler.draft_lengths)
    else:
        fix_costs(llm, 0.2)
        if runner.drafter.lookup is not None:
            runner.drafter.lookup = _CountingPromptLookup(config.prompt_lookup_tokens)
    names = ("sparsity", "draft_weights", "acceptance", "kernel_size", "adaptive", "prompt_lookup_tokens")
    return {name: getattr(config, name) for name in names}


def candidates_taken(llm: Any) -> int:
    """Looked-up candidates that draft steps verified since `make_drafts_pay`; Model Runner V2 has none."""
    runner = model_runner(llm)
    lookup = None if is_v2(runner) else runner.drafter.lookup
    return 0 if lookup is None else lookup.num_taken


def measured_costs(llm: Any) -> dict[str, Any]:
    """Costs as a user asks for them."""
    costs: dict[str, Any] = llm.collective_rpc("sirius_costs")[0]
    return costs


def lengths_by_batch(llm: Any) -> dict[str, Any]:
    """Which scheduler an engine has, and what it measured: seconds by draft length, by the logarithm of the batch size."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    lengths = getattr(scheduler, "draft_lengths", None)
    loads = lengths._loads if lengths is not None else {}
    return {
        "scheduler": type(scheduler).__qualname__,
        "seconds": {str(size): {str(n): s for n, s in load.seconds.items()} for size, load in loads.items()},
    }


def num_preemptions(llm: Any) -> int:
    """Preemptions since the engine started."""
    return sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def prefix_cache_hits(llm: Any) -> int:
    """Prompt tokens that came from the prefix cache."""
    return sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")


def count_passes(llm: Any, prompts: list[list[int]], sampling: dict[str, Any]) -> dict[str, Any]:
    """Generates one prompt after the other and counts the engine's steps, on both runners alike.

    vLLM's own counters cannot be compared: on V2 the scheduler counts a draft for every step of a request, on V1 only for
    those that had one.

    Returns:
        ``token_ids``; ``passes``, the steps after the one that read the prompt; ``tokens``, what those steps emitted.
    """
    from vllm import SamplingParams

    runner = model_runner(llm)
    sample = runner.sample_tokens
    calls = 0

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return sample(*args, **kwargs)

    params = SamplingParams(**{"temperature": 0.0, **sampling})
    runner.sample_tokens = count
    try:
        outputs = [llm.generate([{"prompt_token_ids": p}], params, use_tqdm=False)[0].outputs[0] for p in prompts]
    finally:
        runner.sample_tokens = sample
    token_ids = [list(output.token_ids) for output in outputs]
    return {
        "token_ids": token_ids,
        "passes": calls - len(prompts),
        "tokens": sum(map(len, token_ids)) - len(prompts),
    }


def loaded_hooks(llm: Any) -> list[str]:
    """Targets of Sirius's hooks that are in force in this process."""
    from vllm_sirius.integration.hook_engine import is_installed
    from vllm_sirius.integration.installed_hooks import HOOKS, worker_hooks

    return [hook.target for hook in (*HOOKS, *worker_hooks()) if is_installed(hook)]


def compiled_draft_report(llm: Any) -> dict[str, Any]:
    """Whether the draft is a compiled clone, what it shares with the target, and the keys of their artifacts."""
    from vllm.compilation.decorators import _model_hash_key

    runner = model_runner(llm)
    draft = runner.draft_model if hasattr(runner, "draft_model") else runner.speculator._draft
    ffns = draft._ffns
    target, clone = runner.model, draft._model
    known = {id(parameter) for parameter in target.parameters()}
    parameters = list(clone.parameters())
    return {
        "compiled": draft.compiled,
        "parameters": len(parameters),
        "shared_parameters": sum(id(parameter) in known for parameter in parameters),
        "target_key": _model_hash_key(target.model.forward),
        "draft_key": _model_hash_key(clone.model.forward),
        "kept_graphs": [bool(m.model.was_aot_compile_fn_loaded_from_disk) for m in (target, clone)]
        if draft.compiled
        else [],
        "ffns": len(ffns.ffns),
        "draft_ffns_run": ffns.num_draft_calls,
    }


def load_kept_graphs() -> None:
    """Lets vLLM's CPU build load the graphs that it keeps on disk, as its GPU builds do.

    vLLM 0.32.0 writes them everywhere. On CPU each load fails at its last step, a call of a method that PyTorch's callable
    of plain Inductor does not have, and vLLM compiles again.
    """
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

    BundledAOTAutogradSerializableCallable.finalize_loading = lambda self, vllm_config: None


WATCHED: dict[str, weakref.ref[Any]] = {}


def watch_memory(llm: Any) -> list[str]:
    """Remembers the large things of a compiled engine, without keeping them; returns their names."""
    runner = model_runner(llm)
    draft = runner.draft_model if hasattr(runner, "draft_model") else runner.speculator._draft
    found = {
        "runner": runner,
        "target": runner.model.model,
        "clone": draft._model.model,
        "switch": draft._ffns,
        "copies": draft._ffns.backend,
        "linears": draft._ffns.linears,
    }
    WATCHED.clear()
    WATCHED.update({name: weakref.ref(thing) for name, thing in found.items() if thing is not None})
    return list(WATCHED)


def watched_and_alive() -> list[str]:
    """Names of what `watch_memory` remembered and is still there, after the engine was dropped.

    vLLM keeps the exception of an import that failed while it built the first engine of the process, and with it the frames.
    """
    from vllm.multimodal.media import audio

    failed = getattr(audio, "_torchcodec_import_exc", None)
    if failed is not None:
        failed.__traceback__ = None
    unfreeze()
    gc.collect()
    gc.collect()  # the first one ends the engine, which lets its compiled modules go
    return [name for name, thing in WATCHED.items() if thing() is not None]


def target_kernels_report(llm: Any) -> dict[str, Any]:
    """What runs the target's linear layers, and how often compiled code called Sirius's kernel for a short answer."""
    from vllm.model_executor.layers.linear import LinearBase

    from vllm_sirius.integration import target_linears

    model = model_runner(llm).model
    linears = [module for module in model.modules() if isinstance(module, LinearBase)]
    kernel, calls = target_linears.panel_linear, []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(sys._getframe(1).f_code.co_name)
        return kernel(*args)

    target_linears.panel_linear = counted
    try:
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], use_tqdm=False)
    finally:
        target_linears.panel_linear = kernel
    return {
        "linears": len(linears),
        "panels": sum(module.weight.dim() == 4 for module in linears),
        "head": model.lm_head.cpu_linear.__module__ == target_linears.__name__,
        "compiled_calls": calls.count("_panel_linear"),
    }


def pretend_longest_text(llm: Any, length: int) -> None:
    """Tells the model runner, and nobody else, that texts may be so long."""
    model_runner(llm).vllm_config.model_config.max_model_len = length


def cores() -> list[int]:
    """Cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def streamed_report(llm: Any) -> dict[str, Any]:
    """What an engine streams, and what of it is in memory."""
    runner = model_runner(llm)
    target = (runner.speculator if is_v2(runner) else runner).loaded_target
    found = target.streamed.statistics()
    return {
        "groups": len(target.memory.resident),
        "streamed": target.memory.streamed,
        "buffers": target.streamed.num_bytes,
        "memory": target.memory.memory_bytes,
        "rounds": found.num_rounds,
        "said": llm.collective_rpc("sirius_offload")[0],
        "bytes": found.num_bytes,
        "weights": sum(p.numel() * p.element_size() for p in runner.model.parameters()),
    }
