"""llama.cpp: its models, made of a checkpoint by its own tools, and its server, which answers prompts.

Nothing of llama.cpp is part of this project: `benchmarks.offload.peers` fetches and builds it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.offload import pin
from benchmarks.offload.answering import AnsweringError
from vllm_sirius.measuring.child import child_environment
from vllm_sirius.measuring.engine import Answers

VARIABLE = "LLAMA_CPP"
"""Environment variable with the folder of llama.cpp, where no option has it."""

DRAFT_TYPE = "Q4_K_M"
STOP_SECONDS = 30


@dataclass(frozen=True)
class LlamaFiles:
    """Where llama.cpp and its models lie.

    Attributes:
        folder: With ``source`` and ``build/bin``; ``None`` where the user gave none.
        models: Folder for models in llama.cpp's format.
        draft_type: Type of the draft's weights.
    """

    folder: Path | None
    models: Path
    draft_type: str = DRAFT_TYPE

    @property
    def whole(self) -> Path:
        """The model in bf16."""
        return self.models / "bf16.gguf"

    @property
    def draft(self) -> Path:
        """The same model with few bits."""
        return self.models / f"{self.draft_type.lower()}.gguf"

    def missing(self) -> str:
        """What is missing; empty where llama.cpp is complete."""
        if self.folder is None:
            return f"llama.cpp: give its folder with --llama-cpp or {VARIABLE}; `make offload-peers` makes one"
        absent = [file for file in self._tools(self.folder) if not file.exists()]
        return f"llama.cpp: there is no {absent[0]}; `make offload-peers` builds it" if absent else ""

    def command(self, max_model_len: int, threads: int, draft_length: int) -> list[str]:
        """The command of a server, without host and port.

        Args:
            max_model_len: Longest text.
            threads: Threads to compute with.
            draft_length: Most tokens of a draft; 0 for none.
        """
        assert self.folder is not None
        command = [str(self._tools(self.folder)[0]), "--model", str(self.whole), "--ctx-size", str(max_model_len)]
        # One request at a time, and no prompt that comes back may be found in a cache.
        command += ["--parallel", "1", "--threads", str(threads), "--cache-ram", "0", "--no-warmup", "--fit", "off"]
        if draft_length:
            command += ["--spec-type", "draft-simple", "--model-draft", str(self.draft)]
            command += ["--spec-draft-n-max", str(draft_length)]
            command += ["--threads-draft", str(threads)]
        return command

    def prepare(self, checkpoint: Path, log: Path) -> None:
        """Makes the models that are not there yet; a half-made one is never taken for whole.

        Args:
            checkpoint: Folder of the model.
            log: Takes what the tools print.

        Raises:
            BenchmarkError: If a tool fails.
        """
        assert self.folder is not None
        self.models.mkdir(parents=True, exist_ok=True)
        _, quantize, convert = self._tools(self.folder)
        partial = self.models / "partial.gguf"
        if not self.whole.exists():
            outputs = ["--outtype", "bf16", "--outfile", str(partial)]
            _run([sys.executable, "-P", str(convert), str(checkpoint), *outputs], log, PYTHONPATH=str(convert.parent))
            partial.replace(self.whole)
        if not self.draft.exists():
            _run([str(quantize), str(self.whole), str(partial), self.draft_type], log)
            partial.replace(self.draft)

    @staticmethod
    def _tools(folder: Path) -> tuple[Path, Path, Path]:
        binaries = folder / "build" / "bin"
        return binaries / "llama-server", binaries / "llama-quantize", folder / "source" / "convert_hf_to_gguf.py"


class LlamaServer:
    """llama.cpp's server, asked for one answer at a time.

    Args:
        command: The server's.
        prefix: Words before it.
        log: Takes what it prints.
        patience_seconds: Longest wait for the start and for an answer.
        kept: A file that is kept in memory beside it; ``None`` for none.

    Raises:
        AnsweringError: If it does not start.
    """

    def __init__(
        self,
        command: Sequence[str],
        prefix: Sequence[str],
        log: Path,
        patience_seconds: float,
        kept: Path | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url, self._log, self._patience = f"http://127.0.0.1:{port}", log, patience_seconds
        self._open = ExitStack()
        if kept is not None:
            self._open.enter_context(pin.pinned(kept, prefix))
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*prefix, *command, "--host", "127.0.0.1", "--port", str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.close()
            raise

    def answer(self, token_ids: Sequence[int], max_tokens: int) -> Answers:
        """Answers one prompt greedily.

        Args:
            token_ids: The prompt, with the token numbers of the checkpoint, which llama.cpp keeps.
            max_tokens: Most tokens of the answer.
        """
        question = {
            "prompt": list(token_ids),
            "n_predict": max_tokens,
            "temperature": 0.0,
            "top_k": 1,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        request = urllib.request.Request(
            f"{self._url}/completion", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=self._patience) as response:
                report = json.load(response)
        except (OSError, ValueError) as error:
            raise AnsweringError(f"llama-server stopped answering ({error}); its log is {self._log}") from error
        return as_answers(report, time.perf_counter() - started)

    def close(self) -> None:
        """Ends the server."""
        self._open.close()
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AnsweringError(f"llama-server ended; its log is {self._log}")
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AnsweringError(f"llama-server gave no answer within {self._patience:.0f} s; its log is {self._log}")


def as_answers(report: dict[str, Any], seconds: float) -> Answers:
    """Turns an answer of llama-server into ours.

    Args:
        report: Its JSON.
        seconds: Wall time of the request.

    Returns:
        The answer. The server counts drafted and accepted tokens and not drafts: those are the passes that the tokens
        which no draft gave took, the first token aside, which the prompt's pass gives.
    """
    timings = report.get("timings", {})
    tokens = [int(token) for token in report["tokens"]]
    drafted, accepted = int(timings.get("draft_n", 0)), int(timings.get("draft_n_accepted", 0))
    drafts = max(0, len(tokens) - 1 - accepted) if drafted else 0
    return Answers([tokens], seconds, drafts, drafted, accepted, [])


def _run(command: Sequence[str], log: Path, **variables: str) -> None:
    with log.open("ab") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=child_environment(**variables), check=False
        )
    if done.returncode:
        raise BenchmarkError(f"{Path(command[0]).name} ended with exit status {done.returncode}; its log is {log}")
