"""Answers with everything that a client sees of them. Runs in the child of `engine_host`."""

from __future__ import annotations

from typing import Any


def answers_in_full(llm: Any, requests: list[list[Any]]) -> dict[str, Any]:
    """Answers all requests in one batch.

    Args:
        llm: The engine.
        requests: Prompt and arguments of `SamplingParams` for each; temperature 0 unless given.

    Returns:
        ``drafted`` and ``accepted`` tokens, and the ``answers``: for each request ``outputs``, with ``token_ids``, ``text``,
        ``finish_reason``, ``stop_reason`` and ``logprobs``; and ``prompt_logprobs``. A row of log probabilities maps token
        ids to ``[logprob, rank]``.
    """
    from vllm_sirius.metrics import read_counts

    before = read_counts(llm.get_metrics())
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        [_parameters(sampling) for _, sampling in requests],
        use_tqdm=False,
    )
    counts = read_counts(llm.get_metrics()).since(before)
    answers = [
        {
            "outputs": [
                {
                    "token_ids": list(one.token_ids),
                    "text": one.text,
                    "finish_reason": one.finish_reason,
                    "stop_reason": one.stop_reason,
                    "logprobs": _rows(one.logprobs),
                }
                for one in output.outputs
            ],
            "prompt_logprobs": _rows(output.prompt_logprobs),
        }
        for output in outputs
    ]
    return {"drafted": counts.num_draft_tokens, "accepted": counts.num_accepted_tokens, "answers": answers}


def _parameters(sampling: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    classes = {"structured_outputs": StructuredOutputsParams, "repetition_detection": RepetitionDetectionParams}
    given = {key: classes[key](**value) if key in classes else value for key, value in sampling.items()}
    if "logit_bias" in given:  # JSON has no whole numbers as keys
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    return SamplingParams(**{"temperature": 0.0, **given})


def _rows(logprobs: Any) -> list[dict[str, list[float]] | None] | None:
    if logprobs is None:
        return None
    return [row and {str(token): [float(one.logprob), one.rank] for token, one in row.items()} for row in logprobs]


def field_names(llm: Any) -> list[str]:
    """Names of the public fields of `SamplingParams`."""
    from vllm import SamplingParams

    return [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
