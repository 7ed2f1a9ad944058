"""What tests read of an engine's KV pages, on both runners alike."""

from __future__ import annotations

from typing import Any

import torch

from support.probes import is_v2, model_runner


def free_slots(llm: Any) -> dict[str, int]:
    """Slots of the statistics on Model Runner V1, which hands them out itself."""
    statistics = model_runner(llm).drafter.statistics
    return {"free": len(statistics._free), "all": statistics.num_slots}


def valid_lengths(runner: Any) -> dict[str, tuple[int, int]]:
    """Row of each running request in the block tables, and how many of its positions hold K/V of accepted tokens."""
    if is_v2(runner):
        computed = runner.req_states.num_computed_tokens.gpu.tolist()
        return {req_id: (slot, computed[slot]) for req_id, slot in runner.req_states.req_id_to_index.items()}
    lengths = {}
    for row, req_id in enumerate(runner.input_batch.req_ids):
        # The last token of the text has no K/V yet, and a request in its first step may have none at all.
        if runner.requests[req_id].num_computed_tokens > 0:
            lengths[req_id] = (row, int(runner.input_batch.num_tokens_no_spec[row]) - 1)
    return lengths


def table_block_sizes(runner: Any) -> list[int]:
    """Tokens per block of each KV cache group."""
    if is_v2(runner):
        return list(runner.block_tables.block_sizes)
    groups = range(len(runner.kv_cache_config.kv_cache_groups))
    return [runner.input_batch.block_table[group].block_size for group in groups]


def full_pages(runner: Any, row: int, length: int) -> torch.Tensor:
    """K/V of the blocks that the first `length` positions of one request fill, ``[layers, blocks, ...]``.

    Whole blocks, because vLLM's CPU kernels lay out the keys inside a block as their instruction set likes it.
    """
    layers = []
    for group_id, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        count = length // table_block_sizes(runner)[group_id]
        if is_v2(runner):
            blocks = runner.block_tables.block_tables[group_id].gpu[row, :count].long()
        else:
            blocks = runner.input_batch.block_table[group_id].block_table.cpu[row, :count].long()
        assert bool((blocks > 0).all()), "a position of the text lies in the null block"
        for name in group.layer_names:
            cache = runner.compilation_config.static_forward_context[name].kv_cache
            assert cache.shape[0] == runner.kv_cache_config.num_blocks, "blocks are not the cache's first dimension"
            layers.append(cache[blocks])
    return torch.stack(layers).clone()


def record_pages(llm: Any, prompts: list[list[int]], sampling: dict[str, Any]) -> dict[str, Any]:
    """Generates, and after every step copies the full pages of every request's accepted positions.

    Returns:
        The answers, and the ``index`` of the pages in `RECORDED`: they stay in this process.
    """
    from vllm import SamplingParams

    runner = model_runner(llm)
    block_size = table_block_sizes(runner)[0]
    pages: dict[str, torch.Tensor] = {}
    checks = {"steps": 0, "changed": 0.0}
    sample = runner.sample_tokens

    def sample_and_record(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        checks["steps"] += 1
        for req_id, (row, length) in valid_lengths(runner).items():
            if length < block_size:
                continue
            found = full_pages(runner, row, length)
            known = pages.get(req_id)
            if known is not None:
                common = min(known.shape[1], found.shape[1])
                checks["changed"] = max(checks["changed"], float((known[:, :common] - found[:, :common]).abs().max()))
            pages[req_id] = found
        return output

    runner.sample_tokens = sample_and_record
    try:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(**{"temperature": 0.0, **sampling}),
            use_tqdm=False,
        )
    finally:
        runner.sample_tokens = sample
    RECORDED.append([pages[key] for key in sorted(pages, key=_request_order)])
    return {
        "token_ids": [list(o.outputs[0].token_ids) for o in outputs],
        "index": len(RECORDED) - 1,
        "lengths": [p.shape[1] * block_size for p in RECORDED[-1]],
        **checks,
    }


RECORDED: list[list[torch.Tensor]] = []


def _request_order(req_id: str) -> tuple[int, str]:
    return int(req_id.split("-")[0]), req_id


def compare_recorded(llm: Any, first: int, second: int) -> dict[str, Any]:
    """Largest difference between two recordings over the blocks both have, the size of the values, and the blocks."""
    worst, size, num_blocks = 0.0, 0.0, 0
    for one, other in zip(RECORDED[first], RECORDED[second], strict=True):
        common = min(one.shape[1], other.shape[1])
        num_blocks += common
        worst = max(worst, float((one[:, :common] - other[:, :common]).abs().max()))
        size = max(size, float(one.abs().max()))
    return {"worst": worst, "size": size, "blocks": num_blocks}


def block_sizes(llm: Any) -> list[int]:
    """Tokens per block of each KV cache group."""
    return table_block_sizes(model_runner(llm))


def kv_cache_specs(llm: Any) -> list[str]:
    """Kind of each KV cache group."""
    return [type(group.kv_cache_spec).__name__ for group in model_runner(llm).kv_cache_config.kv_cache_groups]
