"""Engine processes, one per test module and model runner."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.engine_host import EngineHost
from support.runners import RUNNERS


@pytest.fixture(scope="module", params=RUNNERS)
def host(request: pytest.FixtureRequest) -> Iterator[EngineHost]:
    """A process that builds engines one after the other, on each model runner in turn."""
    with EngineHost(runner=request.param) as engine_host:
        yield engine_host


@pytest.fixture(scope="module", params=["v1"])
def host_v1() -> Iterator[EngineHost]:
    """As `host`, on Model Runner V1 alone; in a module that has both, `support.runners.only_v1` shares one process."""
    with EngineHost(runner="v1") as engine_host:
        yield engine_host
