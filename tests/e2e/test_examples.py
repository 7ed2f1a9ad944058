"""The examples, and the programs and commands of the documentation, run as a reader would run them, on SmolLM2.

The README's program of the offline API runs in `test_wheel.py`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.real_models import ROOT, SMOL, model_path
from support.snippets import USAGE, documented_command, documented_program, readme_command

EXAMPLES = ROOT / "examples"
VLLM = Path(sys.executable).with_name("vllm")
TIMEOUT = 600
SERVER_START_SECONDS = 300
KV_CACHE = ["--kv-cache-memory-bytes", "256M"]
"""Less than the README names; the last one counts."""
EAGER = "--enforce-eager"
"""Compiling takes minutes, and `test_compiled_draft` covers it."""


def run(*command: str | Path, **variables: str) -> str:
    """Output of a command that must succeed, with more environment variables."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=ROOT,
        env={**os.environ, **variables},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_offline():
    """In one process; the README's program, which `test_wheel` runs, has the engine in another."""
    command = [sys.executable, EXAMPLES / "offline.py", "--enforce-eager", model_path(SMOL)]
    output = run(*command, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    found = re.search(r"acceptance length (\d+\.\d+)/16 over (\d+) verification passes", output)
    assert found
    assert 1.0 <= float(found[1]) <= 16.0
    assert int(found[2]) > 0


OWN_OPTIONS = [
    ({"sirius": "off"}, 200, "content"),
    ({"sirius": "perhaps"}, 400, "sirius='perhaps'"),
    ({"sirius_threshold": 0.5}, 400, "sirius_threshold=0.5"),
    ({"sirius_threshold": 1e39}, 400, "sirius_threshold=1e+39"),
    ({"sirius_threshold": False}, 400, "sirius_threshold=0 was given"),
]
"""Options of requests, the status of the answer from a lossless engine, and words in it. vLLM makes `false` a 0, which
`test_request_options` knows."""


def test_batch(tmp_path):
    """With the commands of the README, and a few requests with options of their own."""
    requests, answers = tmp_path / "input.jsonl", tmp_path / "output.jsonl"
    model = model_path(SMOL)
    places = {"input.jsonl": str(requests), "output.jsonl": str(answers), "MODEL": model}
    places |= {"python": sys.executable, "vllm": str(VLLM)}
    assert "3 requests written" in run(*readme_command("python examples/batch.py", **places))
    written = requests.read_text().splitlines()
    for number, (options, _, _) in enumerate(OWN_OPTIONS):
        line = json.loads(written[0])
        line["custom_id"] = f"own-{number}"
        line["body"]["vllm_xargs"] = options
        written.append(json.dumps(line))
    requests.write_text("\n".join(written) + "\n")
    run(*readme_command("vllm run-batch", **places), *KV_CACHE, EAGER)
    found = {line["custom_id"]: line for line in map(json.loads, answers.read_text().splitlines())}
    assert len(found) == 3 + len(OWN_OPTIONS)
    for number in range(3):
        assert found[f"question-{number}"]["response"]["body"]["choices"][0]["message"]["content"].strip()
    for number, (_, status, words) in enumerate(OWN_OPTIONS):
        answer = found[f"own-{number}"]
        assert answer["response"]["status_code"] == status, answer
        assert words in json.dumps(answer)


@pytest.mark.slow
def test_the_latency_benchmark_of_the_documentation():
    command = documented_command(USAGE, "vllm bench latency", MODEL=model_path(SMOL), vllm=str(VLLM))
    sizes = ["--input-len", "16", "--output-len", "8", "--num-iters-warmup", "1", "--num-iters", "1"]
    assert "Avg latency" in run(*command, *sizes, *KV_CACHE, EAGER)


@dataclass(frozen=True)
class Server:
    """A running server and what it has logged."""

    url: str
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server as the README starts it, on a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = readme_command("vllm serve MODEL --speculative-model", MODEL=model_path(SMOL), vllm=str(VLLM))
    log = tmp_path_factory.mktemp("server") / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *KV_CACHE, EAGER, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
            cwd=ROOT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process, log)
        yield Server(url, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(url, server, log):
    deadline = time.monotonic() + SERVER_START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    pytest.fail(f"no answer from /health within {SERVER_START_SECONDS} s: {log.read_text()[-4000:]}")


def counter(url, name):
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_serve_and_client(server):
    output = run(sys.executable, EXAMPLES / "serve_client.py", server.url)
    answers = re.split(r"^--- .*$", output, flags=re.MULTILINE)[1:]
    assert len(answers) == 2
    assert all(answer.strip() for answer in answers)
    assert counter(server.url, "vllm:spec_decode_num_drafts_total") > 0
    assert "| kernel size 16, adaptive, lossless |" in server.log.read_text()


def test_the_client_of_the_documentation(server, tmp_path):
    program = documented_program(USAGE, "OpenAI(").replace("http://127.0.0.1:8000", server.url)
    script = tmp_path / "client.py"
    script.write_text(
        program.replace('"MODEL"', f'"{model_path(SMOL)}"') + "print(answer.choices[0].message.content)\n"
    )
    assert run(sys.executable, script).strip()


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [({"sirius": "off"}, 200, "choices"), ({"sirius": "perhaps"}, 400, "sirius='perhaps'")],
    ids=["taken", "refused"],
)
def test_a_request_is_judged_by_the_server(server, options, status, words):
    messages = [{"role": "user", "content": "Name a color."}]
    body = {"model": model_path(SMOL), "messages": messages, "max_tokens": 8, "vllm_xargs": options}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            found = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        found = error.code, error.read().decode()
    assert found[0] == status, found
    assert words in found[1]


def test_the_server_benchmark_of_the_documentation(server, tmp_path):
    talk = [
        {"value": "What is the capital of France?"},
        {"value": "The capital of France is Paris, a city on the Seine."},
    ]
    prompts, report = tmp_path / "prompts.json", tmp_path / "report.json"
    prompts.write_text(json.dumps([{"conversations": talk}] * 4))
    command = documented_command(USAGE, "vllm bench serve", MODEL=model_path(SMOL), FILE=str(prompts), vllm=str(VLLM))
    sizes = ["--num-prompts", "4", "--sharegpt-output-len", "24", "--ignore-eos", "--temperature", "0"]
    result = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", report.name]
    output = run(*command, "--base-url", server.url, *sizes, *result)
    assert re.search(r"Successful requests:\s+4", output)
    found = json.loads(report.read_text())
    assert (found["completed"], found["failed"]) == (4, 0)
    assert found["total_output_tokens"] == 4 * 24
    # The benchmark reads the server's counters of speculation before and after.
    assert "Acceptance length" in output
    assert 1.0 < found["spec_decode_acceptance_length"] <= 16.0


def test_demo(tmp_path):
    """The command of the README, smaller. The environment that it would make is the one that runs this."""
    options = f"--num-prompts 2 --max-tokens 16 --kernel-size 4 --arms threshold-coarse --output {tmp_path}"
    places = [f"VENV={sys.prefix}", f"MODEL={model_path(SMOL)}", f"ARGS={options}"]
    output = run(*readme_command("make demo"), "--old-file=setup", *places)
    assert "vLLM alone" in output
    assert (tmp_path / "demo.png").stat().st_size > 0
    report = json.loads((tmp_path / "demo.json").read_text())
    assert [arm["key"] for arm in report["arms"]] == ["vllm", "threshold-coarse"]
    for arm in report["arms"][1:]:
        assert 1.0 <= arm["acceptance_length"] <= 4.0
        assert arm["start_up_line"]
    assert report["provenance"]["kernel_size"] == 4
    assert os.fspath(ROOT) not in json.dumps(report)
