"""Every option: defaults, agreement of the two lengths, and the full list of refused options."""

import pytest

from vllm_sirius.config import SiriusConfig
from vllm_sirius.errors import SiriusConfigError
from vllm_sirius.request_rules import RequestOptions, parse_request_options


def test_defaults_are_those_of_the_readme():
    config = SiriusConfig.from_options({"method": "sirius", "model": "sirius"})
    assert config == SiriusConfig(
        kernel_size=16,
        sparsity="auto",
        density=0.5,
        refresh=True,
        draft_weights="auto",
        draft_weights_scope="all",
        target_kernels="auto",
        acceptance="lossless",
        draft_sampling="greedy",
        threshold=0.1,
        threshold_temperature=0.6,
        adaptive=True,
        prompt_lookup_tokens=7,
        tree_width=1,
        preset=None,
    )
    assert config.lossless
    assert config.num_speculative_tokens == 15


def test_kernel_size_follows_num_speculative_tokens_and_may_repeat_it():
    assert SiriusConfig.from_options({"num_speculative_tokens": 7}).kernel_size == 8
    assert SiriusConfig.from_options({"num-speculative-tokens": 7, "kernel-size": 8}).kernel_size == 8


def test_boundary_values_are_taken():
    for options in (
        {"kernel_size": 2},
        {"kernel_size": 128},
        {"density": 1},
        {"density": 1e-6},
        {"threshold": -1},
        {"threshold": 2.0},
        {"sparsity": "fine"},
        {"acceptance": "lossless"},
        {"draft_weights": "int8"},
        {"prompt_lookup_tokens": 0},
        {"prompt_lookup_tokens": 31},
        {"draft_weights": "int4", "sparsity": "none", "draft_weights_scope": "all"},
        {"acceptance": "lossless", "draft_sampling": "probabilistic"},
    ):
        config = SiriusConfig.from_options(options)
        assert all(getattr(config, key) == value for key, value in options.items())


@pytest.mark.parametrize("option", [{"threshold": 0.3}, {"threshold_temperature": 1.0}, {"threshold": 2}])
def test_an_option_of_the_threshold_rule_chooses_the_rule(option):
    config = SiriusConfig.from_options(option)
    assert config.acceptance == "threshold"
    assert config == SiriusConfig.from_options({**option, "acceptance": "threshold"})


PAPER = {
    "kernel_size": 16,
    "sparsity": "coarse",
    "density": 0.5,
    "refresh": False,
    "draft_weights": "shared",
    "acceptance": "threshold",
    "threshold": 0.1,
    "threshold_temperature": 0.6,
    "adaptive": False,
    "prompt_lookup_tokens": 0,
}


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {}),
        ({"kernel_size": 8}, {"kernel_size": 8}),
        ({"num_speculative_tokens": 9}, {"kernel_size": 10}),
        ({"num-speculative-tokens": 9, "kernel-size": 10}, {"kernel_size": 10}),
        ({"threshold": 0.05}, {"threshold": 0.05}),
        ({"acceptance": "lossless"}, {"acceptance": "lossless"}),
        ({"acceptance": "lossless", "draft_sampling": "probabilistic"}, {"acceptance": "lossless"}),
        ({"sparsity": "fine"}, {"sparsity": "fine"}),
        ({"sparsity": "auto"}, {"sparsity": "coarse"}),
        ({"density": 0.3, "refresh": True}, {"density": 0.3, "refresh": True}),
        ({"draft_weights": "int4", "draft_weights_scope": "ffn"}, {"draft_weights": "int4"}),
        ({"draft_weights": "int4", "sparsity": "none"}, {"draft_weights": "int4", "sparsity": "none"}),
        ({"adaptive": True, "prompt_lookup_tokens": 3}, {"adaptive": True, "prompt_lookup_tokens": 3}),
    ],
)
def test_the_papers_preset_is_refined_by_what_is_given(given, changed):
    config = SiriusConfig.from_options({"method": "sirius", "preset": "paper", **given})
    assert {key: getattr(config, key) for key in PAPER} == {**PAPER, **changed}
    assert config.preset == "paper"
    # Nothing is left to the machine.
    assert config.resolved(copies=True) == config.resolved(copies=False) == config


REFUSED_OPTIONS = [
    # option(s), the words that the message must hold: the option, its value and the remedy
    ({"kernel_size": 1}, ["kernel_size=1", "from 2 to 128"]),
    ({"kernel_size": 129}, ["kernel_size=129", "from 2 to 128"]),
    ({"kernel_size": 8.0}, ["kernel_size=8.0", "whole number"]),
    ({"kernel_size": True}, ["kernel_size=True", "whole number"]),
    ({"kernel_size": "16"}, ["kernel_size='16'", "whole number"]),
    ({"prompt_lookup_tokens": -1}, ["prompt_lookup_tokens=-1", "from 0 to 31"]),
    ({"prompt_lookup_tokens": 32}, ["prompt_lookup_tokens=32", "from 0 to 31"]),
    ({"prompt_lookup_tokens": True}, ["prompt_lookup_tokens=True", "whole number"]),
    ({"num_speculative_tokens": 0}, ["num_speculative_tokens=0", "from 1 to 127"]),
    ({"num_speculative_tokens": -3}, ["num_speculative_tokens=-3", "from 1 to 127"]),
    (
        {"kernel_size": 16, "num_speculative_tokens": 16},
        ["kernel_size=16", "num_speculative_tokens=16", "kernel_size=17"],
    ),
    ({"sparsity": "medium"}, ["sparsity='medium'", "coarse, fine, none"]),
    ({"sparsity": None}, ["sparsity=None", "coarse, fine, none"]),
    ({"density": 0}, ["density=0", "(0, 1]"]),
    ({"density": 1.5}, ["density=1.5", "(0, 1]"]),
    ({"density": -0.5}, ["density=-0.5", "(0, 1]"]),
    ({"density": float("nan")}, ["density=nan", "finite number"]),
    ({"density": "half"}, ["density='half'", "finite number"]),
    ({"refresh": "yes"}, ["refresh='yes'", "true or false"]),
    ({"refresh": 1}, ["refresh=1", "true or false"]),
    ({"draft_weights": "int2"}, ["draft_weights='int2'", "auto, shared, int8, int4"]),
    ({"target_kernels": "onednn"}, ["target_kernels='onednn'", "auto, vllm, sirius"]),
    ({"draft_weights_scope": "head"}, ["draft_weights_scope='head'", "ffn, all"]),
    (
        {"draft_weights": "shared", "draft_weights_scope": "all"},
        ["draft_weights_scope='all'", "draft_weights='shared'", "drop it"],
    ),
    ({"acceptance": "strict"}, ["acceptance='strict'", "lossless, threshold"]),
    ({"draft_sampling": "nucleus"}, ["draft_sampling='nucleus'", "greedy, probabilistic"]),
    (
        {"draft_sampling": "probabilistic", "acceptance": "threshold"},
        ["draft_sampling='probabilistic'", "acceptance='lossless'", "'greedy'"],
    ),
    ({"draft_sampling": "probabilistic", "threshold": 0.2}, ["draft_sampling='probabilistic'", "without a threshold"]),
    ({"draft_sampling": "probabilistic", "preset": "paper"}, ["draft_sampling='probabilistic'", "'lossless'"]),
    ({"preset": "fast"}, ["preset='fast'", "not one of paper"]),
    ({"preset": None}, ["preset=None", "not one of paper"]),
    ({"preset": ["paper"]}, ["preset=['paper']", "not one of paper"]),
    ({"presets": "paper"}, ["'presets'", "did you mean 'preset'"]),
    ({"preset": "paper", "acceptance": "lossless", "threshold": 0.1}, ["threshold=0.1", "acceptance='lossless'"]),
    ({"preset": "paper", "kernel_size": 8, "num_speculative_tokens": 8}, ["kernel_size=8", "kernel_size=9"]),
    ({"preset": "paper", "sparsity": "none"}, ["sparsity='none'", "draft_weights='shared'"]),
    ({"preset": "paper", "draft_weights_scope": "ffn"}, ["draft_weights_scope='ffn'", "draft_weights='shared'"]),
    ({"threshold": float("inf")}, ["threshold=inf", "finite number"]),
    ({"threshold": "low"}, ["threshold='low'", "finite number"]),
    ({"threshold": 1e39}, ["threshold=1e+39", "3.4e38"]),
    ({"threshold": 10**400}, ["threshold=1000", "3.4e38"]),
    ({"threshold_temperature": 1e39}, ["threshold_temperature=1e+39", "3.4e38"]),
    ({"threshold_temperature": float("nan")}, ["threshold_temperature=nan", "finite number"]),
    ({"threshold_temperature": 1e-46}, ["threshold_temperature=1e-46", "0.6"]),
    ({"threshold": False}, ["threshold=False", "finite number"]),
    ({"threshold_temperature": 0}, ["threshold_temperature=0", "0.6"]),
    ({"threshold_temperature": -1.0}, ["threshold_temperature=-1.0", "0.6"]),
    ({"adaptive": "auto"}, ["adaptive='auto'", "true or false"]),
    ({"tree_width": 4}, ["tree_width=4", "not supported yet", "1"]),
    ({"tree_width": 0}, ["tree_width=0", "at least 1"]),
    (
        {"sparsity": "none", "draft_weights": "shared"},
        ["sparsity='none'", "draft_weights='shared'", "'coarse' or 'fine'"],
    ),
    ({"sparsity": "none", "draft_weights": "int4", "density": 0.5}, ["density=0.5", "sparsity='none'", "drop it"]),
    ({"sparsity": "none", "draft_weights": "int4", "refresh": True}, ["refresh=True", "sparsity='none'", "drop it"]),
    ({"acceptance": "lossless", "threshold": 0.1}, ["threshold=0.1", "acceptance='lossless'", "drop it"]),
    ({"acceptance": "lossless", "threshold_temperature": 1.0}, ["threshold_temperature=1.0", "acceptance='lossless'"]),
    ({"sparsity": "fine", "refresh": True}, ["refresh=True", "sparsity='fine'", "drop it"]),
    ({"treshold": 0.1}, ["'treshold'", "did you mean 'threshold'"]),
    ({"draft_tensor_parallel_size": 2}, ["'draft_tensor_parallel_size'", "not an option"]),
    ({"quantization": "fp8"}, ["'quantization'", "known options are acceptance"]),
]


@pytest.mark.parametrize(("options", "words"), REFUSED_OPTIONS, ids=lambda value: str(value)[:60])
def test_bad_option_is_refused_with_option_value_and_remedy(options, words):
    with pytest.raises(SiriusConfigError) as refusal:
        SiriusConfig.from_options(options)
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert message.count("\n") == 0


def test_request_may_switch_off_and_set_its_threshold():
    config = SiriusConfig(acceptance="threshold")
    assert parse_request_options(None, config) == RequestOptions(True, 0.1)
    assert parse_request_options({"other_plugin": 3}, config) == RequestOptions(True, 0.1)
    assert parse_request_options({"sirius": "off"}, config) == RequestOptions(False, 0.1)
    assert parse_request_options({"sirius": False}, config) == RequestOptions(False, 0.1)
    assert parse_request_options({"sirius": 1, "sirius_threshold": "0.5"}, config) == RequestOptions(True, 0.5)


REFUSED_REQUEST_OPTIONS = [
    ({"sirius": "maybe"}, ["sirius='maybe'", "on or off"]),
    ({"sirius_threshold": "low"}, ["sirius_threshold='low'", "0.1"]),
    ({"sirius_threshold": float("nan")}, ["sirius_threshold=nan"]),
    ({"sirius_threshold": True}, ["sirius_threshold=True"]),
    ({"sirius_threshold": [0.1]}, ["sirius_threshold=[0.1]"]),
    ({"sirius_density": 0.3}, ["'sirius_density'", "'sirius_threshold'"]),
]


@pytest.mark.parametrize(("extra_args", "words"), REFUSED_REQUEST_OPTIONS, ids=lambda value: str(value)[:60])
def test_bad_request_option_is_refused(extra_args, words):
    with pytest.raises(SiriusConfigError) as refusal:
        parse_request_options(extra_args, SiriusConfig(acceptance="threshold"))
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_request_cannot_make_a_lossless_engine_lossy():
    with pytest.raises(SiriusConfigError, match=r"sirius_threshold=0\.1.*acceptance='lossless'"):
        parse_request_options({"sirius_threshold": 0.1}, SiriusConfig())


@pytest.mark.parametrize(
    ("options", "with_copies", "without"),
    [
        ({}, ("none", "int4"), ("coarse", "shared")),
        ({"draft_weights": "int8"}, ("none", "int8"), ("coarse", "int8")),
        ({"draft_weights": "shared"}, ("coarse", "shared"), ("coarse", "shared")),
        ({"density": 0.3}, ("coarse", "int8"), ("coarse", "shared")),
        ({"refresh": False, "sparsity": "auto"}, ("coarse", "int8"), ("coarse", "shared")),
        ({"sparsity": "fine"}, ("fine", "int8"), ("fine", "shared")),
        ({"sparsity": "coarse", "draft_weights": "int4"}, ("coarse", "int4"), ("coarse", "int4")),
    ],
)
def test_what_is_automatic_is_decided_by_where_drafts_read(options, with_copies, without):
    for copies, expected in ((True, with_copies), (False, without)):
        config = SiriusConfig.from_options(options).resolved(copies)
        assert (config.sparsity, config.draft_weights) == expected
        assert config.resolved(copies) == config


def test_what_is_decided_is_checked_again():
    config = SiriusConfig.from_options({"sparsity": "none"})
    assert config.resolved(copies=True).draft_bits == 4
    with pytest.raises(SiriusConfigError, match="sparsity='none' with draft_weights='shared'"):
        config.resolved(copies=False)
