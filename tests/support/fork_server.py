"""A process that has imported vLLM once and forks engine processes: importing takes seconds, forking takes a moment.

The server imports what ``from vllm import LLM`` imports, as a user's program does before any plugin is loaded, and nothing
else: every child loads the plugins, sets its threads and builds engines by itself. It runs no parallel region and starts no
thread, without which forking would be unsafe.

A server belongs to one PYTHONPATH, which counts when vLLM is imported and has a folder of its own for Model Runner V2. All
other variables are the child's own. Requests are JSON messages on a socket, with the child's standard streams beside them.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

LARGEST_MESSAGE = 1 << 17
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1"}
"""NumPy would start some as soon as it is imported."""


class ForkServer:
    """The tests' end of a server.

    Args:
        environment: All variables of the server.
    """

    _of_path: ClassVar[dict[str, ForkServer]] = {}

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env={**environment, **NO_THREADS},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    @classmethod
    def of(cls, environment: dict[str, str]) -> ForkServer:
        """The server for these variables, which is started at the first call and after its death."""
        path = environment["PYTHONPATH"]
        known = cls._of_path.get(path)
        if known is None or known._process.poll() is not None:
            known = cls._of_path[path] = cls(environment)
        return known

    def spawn(self, environment: dict[str, str], stdin: int, stdout: int) -> ForkedProcess:
        """Forks an engine process with these variables and streams; its errors go where this process's go.

        What vLLM set when it was imported stays.
        """
        ours = {**self._environment, **NO_THREADS}
        changed = {name: value for name, value in environment.items() if ours.get(name) != value}
        request = {"set": changed, "unset": [name for name in ours if name not in environment]}
        return ForkedProcess(self, self.ask(request, stdin, stdout, 2))

    def ask(self, request: dict[str, Any], *handles: int) -> Any:
        """Sends a request and returns the server's answer."""
        message = json.dumps(request).encode()
        assert len(message) < LARGEST_MESSAGE
        try:
            socket.send_fds(self._socket, [message], handles)
            answer = self._socket.recv(64)
        except OSError:
            answer = b""
        if not answer:
            raise RuntimeError(f"the server of engine processes ended with status {self._process.wait(60)}")
        return json.loads(answer)


class ForkedProcess:
    """A child of a server."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._status: int | None = None

    def wait(self, timeout: float) -> int:
        """Its status, negative for a signal; ends it by force after so many seconds, which is an error."""
        deadline = time.monotonic() + timeout
        while self._status is None:
            self._status = self._server.ask({"status": self.pid})
            if self._status is None:
                if time.monotonic() > deadline:
                    os.kill(self.pid, signal.SIGKILL)
                    raise TimeoutError(f"an engine process did not end within {timeout} seconds")
                time.sleep(0.02)
        return self._status


def _serve(connection: socket.socket) -> None:
    import vllm

    from support import engine_child

    assert vllm.LLM is not None  # importing it is what the server is for
    gc.collect()
    gc.freeze()
    # Intel's OpenMP binds a child to its first core.
    cores = os.sched_getaffinity(0)
    os.register_at_fork(after_in_child=lambda: os.sched_setaffinity(0, cores))
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads, and forking keeps one of them"
    while True:
        message, handles, _, _ = socket.recv_fds(connection, LARGEST_MESSAGE, 3)
        if not message:
            return
        request = json.loads(message)
        answer: int | None
        if "status" in request:
            ended, status = os.waitpid(request["status"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if answer == 0:
                connection.close()
                _become(engine_child, request, handles)
            for handle in handles:
                os.close(handle)
        connection.send(json.dumps(answer).encode())


def _become(engine_child: Any, request: dict[str, Any], handles: list[int]) -> None:
    """Runs a child to its end, with the clean-up of an interpreter that ends, but for memory that goes with the process."""
    status = 1
    try:
        for stream, handle in enumerate(handles):
            os.dup2(handle, stream)
            os.close(handle)
        for name in request["unset"]:
            os.environ.pop(name, None)
        os.environ.update(request["set"])
        engine_child.main()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        status = 0
    except BaseException:  # noqa: BLE001 - the child must not return into the server
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        _serve(inherited)
