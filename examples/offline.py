"""Sirius in the offline API: `python examples/offline.py [--enforce-eager] [MODEL]`.

The model drafts for itself; the output is its own.
"""

import argparse

from vllm import LLM, SamplingParams

from vllm_sirius.metrics import read_counts

MODEL = ".models/smollm2-135m-instruct"
QUESTIONS = ["Name the planets of the solar system.", "Write a Python function that adds two numbers."]


def main() -> None:
    """Answers the questions and says how many tokens each verification pass advanced."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=MODEL)
    parser.add_argument("--enforce-eager", action="store_true", help="start in seconds instead of compiling first")
    given = parser.parse_args()
    llm = LLM(
        model=given.model,
        enforce_eager=given.enforce_eager,
        speculative_config={"method": "sirius", "kernel_size": 16},
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 30,  # on CPU vLLM would take most of the machine's memory
        disable_log_stats=False,  # for get_metrics
    )
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for output in llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=64)):
        print(output.outputs[0].text.strip(), end="\n\n")
    counts = read_counts(llm.get_metrics())
    print(f"acceptance length {counts.acceptance_length:.2f}/16 over {counts.num_drafts} verification passes")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
