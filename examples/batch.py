r"""Writes an input file for ``vllm run-batch``: `python examples/batch.py INPUT.jsonl [MODEL]`.

Then run::

    vllm run-batch -i INPUT.jsonl -o OUTPUT.jsonl --model .models/smollm2-135m-instruct \
        --speculative-config '{"method": "sirius"}' \
        --max-model-len 1024 --kv-cache-memory-bytes 1G

The order of the answers is that of the requests.
"""

import json
import sys
from pathlib import Path

MODEL = ".models/smollm2-135m-instruct"
QUESTIONS = ["What is the capital of France?", "How many days has a week?", "Name three metals."]


def main() -> None:
    """Writes one request per line, in the format of OpenAI's batch API."""
    model = sys.argv[2] if len(sys.argv) > 2 else MODEL
    lines = []
    for number, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        body = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": 32}
        request = {"custom_id": f"question-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(request))
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} requests written to {sys.argv[1]}")


if __name__ == "__main__":
    main()
