"""All doors of configuration reach the same engine: flags, JSON, AsyncLLM, bench (runner v1).

`vllm serve`, its benchmark and `vllm run-batch` are in `test_examples`.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.engine_host import EngineHost
from support.real_models import SMOL, model_path

TIMEOUT = 240
COMMON = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
MEMORY = ["--kv-cache-memory-bytes", str(128 << 20)]
LEGACY = ["--speculative-model", "sirius", "--num-speculative-tokens", "7"]
SHORT = ["--spec-method", "sirius", "--spec-tokens", "7"]
PAPER = ["--speculative-config", '{"method": "sirius", "preset": "paper", "num_speculative_tokens": 7}']
STARTED = "| kernel size 8, adaptive, lossless |"
"""In Sirius's start-up line."""
STARTED_AS_IN_THE_PAPER = ", coarse density 0.5 | preset paper, kernel size 8, threshold 0.1 (lossy) |"


VLLM = str(Path(sys.executable).with_name("vllm"))


def environment() -> dict[str, str]:
    return {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def vllm(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    variables = {**environment(), **variables}
    return subprocess.run(
        [VLLM, *arguments], capture_output=True, text=True, timeout=TIMEOUT, env=variables, check=False
    )


def parse(doors, model):
    """What the arguments of each door come to: class, draft length and options. Runs in a process of its own."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = []
    for arguments in doors:
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        given = parser.parse_args(["--model", model, *arguments])
        config = AsyncEngineArgs.from_cli_args(given).create_engine_config().speculative_config
        found.append([type(config).__name__, config.num_speculative_tokens, repr(getattr(config, "sirius", None))])
    return found


def test_flags_and_json_agree():
    doors = [
        LEGACY,
        SHORT,
        ["--spec-model", "sirius", "--spec-tokens", "7"],
        ["--speculative-config", '{"method": "sirius", "kernel_size": 8}'],
        ["--speculative-config", '{"model": "sirius", "num_speculative_tokens": 7}'],
        ["--speculative-config.method", "sirius", "--speculative-config.kernel_size", "8"],
        ["--speculative-model", "sirius", "--speculative-config", '{"kernel_size": 8}'],
    ]
    paper = [
        PAPER,
        ["--speculative-config.method", "sirius", "--speculative-config.preset", "paper", "--spec-tokens", "7"],
        ["--spec-method", "sirius", "--speculative-config", '{"preset": "paper", "kernel_size": 8}'],
    ]
    with EngineHost() as host:
        found = host.call(f"{__file__}:parse", doors + paper, model_path(SMOL))
    assert len(found) == len(doors) + len(paper)
    for agreeing, words in (
        (found[: len(doors)], ["kernel_size=8", "acceptance='lossless'"]),
        (found[len(doors) :], ["kernel_size=8", "acceptance='threshold'", "preset='paper'"]),
    ):
        assert {tuple(one) for one in agreeing} == {tuple(agreeing[0])}
        assert agreeing[0][:2] == ["SiriusSpeculativeConfig", 7]
        assert all(word in agreeing[0][2] for word in words), agreeing[0][2]


ASYNC = """
import asyncio, sys
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=128 << 20,
        speculative_config={"method": "sirius", "preset": "paper", "kernel_size": 8},
    ))
    options = [{"sirius": "off"}, {"sirius": "on", "sirius_threshold": "0.5"}, {}]
    async def ask(i):
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=options[i])
        async for output in engine.generate({"prompt_token_ids": [10 + i, 20, 30]}, sampling, str(i)):
            last = output
        return last.outputs[0].token_ids
    answers = await asyncio.gather(*(ask(i) for i in range(3)))
    engine.shutdown()
    print("LENGTHS", [len(answer) for answer in answers])

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.slow
def test_async_engine(tmp_path):
    """The server of `test_examples` is such an engine too."""
    script = tmp_path / "async_engine.py"
    script.write_text(ASYNC, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(script), model_path(SMOL)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(),
        check=False,
    )
    assert "LENGTHS [12, 12, 12]" in run.stdout, run.stderr[-3000:]
    assert STARTED_AS_IN_THE_PAPER in run.stdout + run.stderr


@pytest.mark.slow
def test_bench_latency():
    sizes = [
        "--input-len",
        "16",
        "--output-len",
        "16",
        "--batch-size",
        "2",
        "--num-iters-warmup",
        "1",
        "--num-iters",
        "1",
    ]
    run = vllm("bench", "latency", "--model", model_path(SMOL), *COMMON, *MEMORY, *LEGACY, *sizes)
    assert "Avg latency" in run.stdout, run.stderr[-3000:]
    assert STARTED in run.stdout + run.stderr


def test_bench_throughput():
    """In one process, as the servers of other tests are not."""
    sizes = ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "16", "--num-prompts", "4"]
    command = ["bench", "throughput", "--model", model_path(SMOL), *COMMON, *MEMORY, *SHORT, *sizes]
    run = vllm(*command, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert "Throughput:" in run.stdout, run.stderr[-3000:]
    assert STARTED in run.stdout + run.stderr


def test_a_bad_option_ends_serve_before_the_engine_starts():
    run = vllm("serve", model_path(SMOL), *COMMON, "--speculative-config", '{"method": "sirius", "density": 7}')
    assert run.returncode != 0
    assert "density=7 is not in (0, 1]" in run.stderr + run.stdout
    assert "Starting to load model" not in run.stderr + run.stdout


def test_doctor():
    command = [str(Path(sys.executable).with_name("vllm-sirius")), "doctor", model_path(SMOL)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "lossless: the output is the model's own" in run.stdout


def doctor(*arguments):
    """Runs the command in this process; returns its status and what it printed."""
    from vllm_sirius import cli

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = cli.main(["doctor", *arguments])
    return status, printed.getvalue()


def test_doctor_for_programs():
    with EngineHost() as host:
        status, printed = host.call(
            f"{__file__}:doctor", model_path(SMOL), "--json", "--speculative-config", '{"preset": "paper"}'
        )
    assert status == 0
    report = json.loads(printed)
    assert (report["preset"], report["acceptance"]) == ("paper", "threshold")
    # SmolLM2-135M: 30 layers of 3 x 576 x 1536 in FFNs, 135M parameters with a tied embedding of 49152 x 576.
    assert report["gated_ffns"] == 30
    assert report["ffn_share"] == pytest.approx(30 * 3 * 576 * 1536 / 134.5e6, rel=0.01)


@pytest.mark.parametrize("command", [("doctor",), ("tune", "--prompts", "prompts.txt")], ids=["doctor", "tune"])
def test_what_vllm_says_against_a_model_becomes_one_line(tmp_path, command):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    program = str(Path(sys.executable).with_name("vllm-sirius"))
    run = subprocess.run(
        [program, command[0], str(tmp_path), *command[1:]],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "CRITICAL"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"error: vLLM cannot serve {tmp_path}: ")
    assert "model type `nonsense`" in last
