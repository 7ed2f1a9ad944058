"""Engine processes, one per test module and model runner, and the models that they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support import subjects
from support.engine_host import EngineHost
from support.runners import RUNNERS
from support.subjects import Subject
from support.tiny_models import build


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Folder of a tiny model: ``tiny_model(name, variant)``."""
    root = tmp_path_factory.getbasetemp().parent / "tiny-models"
    return lambda name, variant=0: str(build(name, root, variant))


@pytest.fixture(scope="module")
def subject(host: EngineHost, tiny_model: Callable[..., str]) -> Subject:
    """The model of a test that runs on both model runners."""
    return subjects.of_runner(host.runner, tiny_model("llama"))
