"""Follows one step of an engine through the plugin's functions. Runs in the child of `engine_host`."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

STEP = "_update_states"
"""Its call begins a step."""


def hops_of_a_step(llm: Any, hops: list[list[str]], prompt: list[int]) -> list[list[str]]:
    """The functions that a decoding step calls, each once, in the order of their first calls.

    Args:
        llm: An engine in this process.
        hops: The functions that matter, file below the package and name.
        prompt: Token ids.

    Returns:
        Those of `hops` that one of the steps called that verified a draft.
    """
    from vllm import SamplingParams

    wanted = {tuple(hop) for hop in hops}
    steps: list[list[list[str]]] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if event != "call" or "/vllm_sirius/" not in file:
            return
        hop = (file.rpartition("/vllm_sirius/")[2], name)
        if hop not in wanted:
            return
        if name == STEP:
            steps.append([])
        if steps and list(hop) not in steps[-1]:
            steps[-1].append(list(hop))

    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    sys.setprofile(watch)
    try:
        llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    finally:
        sys.setprofile(None)
    verified = [step for step in steps if any(name == "emit_tokens" for _, name in step)]
    return max(verified, key=len, default=[])
