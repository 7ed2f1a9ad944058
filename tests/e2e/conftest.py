"""One engine process per test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.engine_host import EngineHost


@pytest.fixture(scope="module")
def host() -> Iterator[EngineHost]:
    """A process that builds engines one after the other."""
    with EngineHost() as engine_host:
        yield engine_host
