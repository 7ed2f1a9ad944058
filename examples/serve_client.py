r"""A client of a server that drafts with Sirius: `python examples/serve_client.py [URL]`.

Start the server first::

    vllm serve .models/smollm2-135m-instruct --speculative-model sirius --num-speculative-tokens 15 \
        --max-model-len 1024 --kv-cache-memory-bytes 1G

``vllm_xargs`` carries the options of one request: ``sirius`` (on or off) and, where the server was started with
``"acceptance": "threshold"``, ``sirius_threshold``.
"""

import sys

from openai import OpenAI

QUESTION = "Write a Python function that adds two numbers."
REQUESTS = {
    "as the server was started": {},
    "without Sirius": {"sirius": "off"},
}


def main() -> None:
    """Asks the same question with different options."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    for title, options in REQUESTS.items():
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0.0,
            max_tokens=48,
            extra_body={"vllm_xargs": options} if options else {},
        )
        print(f"--- {title}\n{answer.choices[0].message.content}\n")


if __name__ == "__main__":
    main()
