"""The examples run as a reader would run them, on SmolLM2."""

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
from pathlib import Path

import pytest
from support.real_models import ROOT, SMOL, model_path

EXAMPLES = ROOT / "examples"
VLLM = Path(sys.executable).with_name("vllm")
TIMEOUT = 600
SERVER_START_SECONDS = 300
KV_CACHE = ["--kv-cache-memory-bytes", "256M"]
EAGER = "--enforce-eager"
"""Compiling takes minutes, and `test_compiled_draft` covers it."""


def run(*command: str | Path) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_offline():
    output = run(sys.executable, EXAMPLES / "offline.py", "--enforce-eager", model_path(SMOL))
    found = re.search(r"acceptance length (\d+\.\d+)/16 over (\d+) correction passes", output)
    assert found
    assert 1.0 <= float(found[1]) <= 16.0
    assert int(found[2]) > 0


def test_batch(tmp_path):
    requests, answers = tmp_path / "input.jsonl", tmp_path / "output.jsonl"
    model = model_path(SMOL)
    assert "3 requests written" in run(sys.executable, EXAMPLES / "batch.py", requests, model)
    sirius = json.dumps({"method": "sirius"})
    engine = ["--model", model, "--speculative-config", sirius, "--max-model-len", "1024", *KV_CACHE, EAGER]
    run(VLLM, "run-batch", "-i", requests, "-o", answers, *engine)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == ["question-0", "question-1", "question-2"]
    for line in lines:
        assert line["response"]["body"]["choices"][0]["message"]["content"].strip()


@pytest.fixture
def server_url(tmp_path):
    """A server with the legacy flags on a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [
        "--speculative-model",
        "sirius",
        "--num-speculative-tokens",
        "15",
        "--max-model-len",
        "1024",
        *KV_CACHE,
        EAGER,
    ]
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [VLLM, "serve", model_path(SMOL), *flags, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, server, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


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


def test_serve_and_client(server_url):
    output = run(sys.executable, EXAMPLES / "serve_client.py", server_url)
    answers = re.split(r"^--- .*$", output, flags=re.MULTILINE)[1:]
    assert len(answers) == 2
    assert all(answer.strip() for answer in answers)
    assert counter(server_url, "vllm:spec_decode_num_drafts_total") > 0


def test_demo(tmp_path):
    options = ["--model", model_path(SMOL), "--num-prompts", "2", "--max-tokens", "16", "--kernel-size", "4"]
    options += ["--arms", "lossless", "threshold-coarse"]
    output = run(sys.executable, EXAMPLES / "demo" / "run.py", *options, "--output", tmp_path)
    assert "vLLM alone" in output
    assert (tmp_path / "demo.png").stat().st_size > 0
    report = json.loads((tmp_path / "demo.json").read_text())
    assert [arm["key"] for arm in report["arms"]] == ["vllm", "lossless", "threshold-coarse"]
    for arm in report["arms"][1:]:
        assert 1.0 <= arm["acceptance_length"] <= 4.0
        assert arm["start_up_line"]
    assert report["provenance"]["kernel_size"] == 4
    assert os.fspath(ROOT) not in json.dumps(report)
