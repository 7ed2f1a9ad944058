"""Weights that come into a running engine past it: the draft follows, and bad ones stop the drafts and not the engine."""

import logging

import pytest
from torch import nn

from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.reload import TargetReload


class Engine:
    """A model whose weights are one number, and what is derived from it; a negative number is one of bad weights."""

    def __init__(self):
        self.model = nn.Module()
        self.model.load_weights = self.load
        self.weights = self.derived = self.version = 0
        self.forgot = []
        self.reload = TargetReload(self.model, self.remake, version=lambda: self.version)
        self.reload.call_after(lambda: self.forgot.append(self.weights))
        assert self.reload.refresh_if_stale()

    def load(self, weights):
        self.weights = weights

    def write(self, weights):
        """In place, which no call of the model shows."""
        self.weights = weights
        self.version += 1

    def remake(self):
        if self.weights < 0:
            raise SiriusUnsupportedError("weights of the checkpoint are not finite: a.weight (NaN); download it again")
        self.derived = self.weights


WAYS = pytest.mark.parametrize("way", ["load_weights", "in place"])


def put(engine, way, weights):
    if way == "in place":
        engine.write(weights)
    else:
        engine.model.load_weights(weights)


@WAYS
def test_bad_weights_stop_the_drafts_and_better_ones_let_them_go_on(way, caplog):
    engine = Engine()
    for bad in (-1, -2):
        caplog.clear()
        put(engine, way, bad)
        with caplog.at_level(logging.INFO, "vllm.sirius"):
            assert [engine.reload.refresh_if_stale() for _ in range(3)] == [False] * 3
        # Once, however many steps follow.
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        message = record.getMessage()
        assert "nothing is drafted" in message
        assert "until other weights are loaded" in message
        assert "a.weight (NaN); download it again" in message
        assert engine.derived == 0
        assert engine.forgot[-1] == bad
    put(engine, way, 3)
    assert engine.reload.refresh_if_stale()
    assert (engine.derived, engine.forgot) == (3, [-1, -2, 3])


def test_whoever_reloads_through_the_engine_is_told_and_can_mend_it():
    engine = Engine()
    with pytest.raises(SiriusUnsupportedError, match="not finite"), engine.reload.loading(True):
        engine.model.load_weights(-1)
    assert not engine.reload.refresh_if_stale()
    with engine.reload.loading(True):
        engine.model.load_weights(2)
    assert engine.reload.refresh_if_stale()
    assert engine.derived == 2
