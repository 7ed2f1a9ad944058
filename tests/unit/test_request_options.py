"""Values of the options that belong to one request, as Python and as the HTTP API hand them over."""

import pytest
import torch

from vllm_sirius.config import SiriusConfig
from vllm_sirius.errors import SiriusConfigError
from vllm_sirius.request_rules import parse_request_options

THRESHOLD = SiriusConfig(acceptance="threshold")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (0.5, 0.5),
        ("0.5", 0.5),
        (0.0, 0.0),
        ("0", 0.0),
        (1.0, 1.0),
        ("1", 1.0),
        (2, 2.0),
        (-1, -1.0),
        ("1e3", 1000.0),
        (1e38, 1e38),
        (-3.4e38, -3.4e38),
    ],
)
def test_thresholds_are_numbers_or_their_text(given, meant):
    found = parse_request_options({"sirius_threshold": given}, THRESHOLD).threshold
    assert found == meant
    assert type(found) is float
    # What holds them on the device takes every one.
    torch.zeros(1, dtype=torch.float32)[0] = found


@pytest.mark.parametrize(
    "given",
    [
        1e39,
        -1e39,
        10**400,
        "1e39",
        float("nan"),
        "nan",
        float("inf"),
        "-inf",
        "",
        "low",
        "0,5",
        "true",
        None,
        [0.1],
        b"0.5",
    ],
    ids=lambda value: repr(value)[:20],
)
def test_other_thresholds_are_refused(given):
    with pytest.raises(SiriusConfigError, match=r"sirius_threshold=.* is not a finite number .* such as 0\.1"):
        parse_request_options({"sirius_threshold": given}, THRESHOLD)


@pytest.mark.parametrize("given", [True, False, 1, 0])
def test_what_may_have_been_a_truth_value_is_no_threshold(given):
    """The HTTP API makes 1 of `true` and 0 of `false`; a 0 would accept every draft."""
    with pytest.raises(SiriusConfigError, match=rf"sirius_threshold={given} may be true or false.*0\.0 or 1\.0"):
        parse_request_options({"sirius_threshold": given}, THRESHOLD)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("on", True), ("OFF", False), (True, True), (False, False), (1, True), (0, False), ("true", True)],
)
def test_switches(given, meant):
    assert parse_request_options({"sirius": given}, THRESHOLD).enabled is meant


@pytest.mark.parametrize("given", ["maybe", "", None, 2, 0.5, ["on"]])
def test_other_switches_are_refused_in_the_words_of_the_documentation(given):
    with pytest.raises(SiriusConfigError, match=r"sirius=.* is not a switch: use on or off\."):
        parse_request_options({"sirius": given}, THRESHOLD)


def test_names_of_others_may_be_no_text():
    assert parse_request_options({3: "sirius"}, THRESHOLD).enabled
