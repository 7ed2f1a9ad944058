"""The processes that tests run engines in are as good as a user's, and tell how they end."""

from __future__ import annotations

import os

import pytest
from support.engine_host import EngineError, EngineHost


def test_a_forked_engine_process_may_use_every_core() -> None:
    with EngineHost() as host:
        assert host.probe_static("support.probes:cores") == sorted(os.sched_getaffinity(0))


def test_the_end_of_an_engine_process_is_told_with_its_status() -> None:
    with EngineHost() as host, pytest.raises(EngineError, match="ended with status 3"):
        host.probe_static("os:_exit", status=3)
