"""Which model runners a test runs on: both, unless it is marked otherwise.

The fixture `host` stands for one engine process for each; the marks below choose the runner of a single test through it, so
that the process is shared and the runner is in the test's id all the same.
"""

from __future__ import annotations

import pytest

RUNNERS = ("v1", "v2")

only_v1 = pytest.mark.parametrize("host", ["v1"], indirect=True)
"""What only Model Runner V1 can show, or what V2 would repeat at too high a cost."""

only_v2 = pytest.mark.parametrize("host", ["v2"], indirect=True)
"""What only Model Runner V2 has."""

v2_is_slow = pytest.mark.parametrize("host", ["v1", pytest.param("v2", marks=pytest.mark.slow)], indirect=True)
"""`make test` runs it on Model Runner V1, `make test-all` on both."""
