"""The key by which vLLM keeps compiled graphs: another one for each graph, the same where only running differs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from vllm_sirius.config import SiriusConfig
from vllm_sirius.integration.speculative_config import ResolvedDraft, SiriusSpeculativeConfig, settle


def key(options, copies=True, native=True, panels=False, streamed=()):
    """The key of an engine that is loaded."""
    given = SiriusConfig.from_options(options)
    vllm_config = SimpleNamespace(speculative_config=SiriusSpeculativeConfig(sirius=given))
    decided = given.resolved(copies and native)
    config = replace(decided, target_kernels="sirius" if panels else "vllm")
    settle(vllm_config, ResolvedDraft(config, native, streamed))
    return vllm_config.speculative_config.compute_hash()


DIFFERENT = {
    "default": key({}),
    "panels": key({}, panels=True),
    "streamed": key({}, panels=True, streamed=(0, 1)),
    "streamed otherwise": key({}, panels=True, streamed=(1,)),
    "ffn": key({"draft_weights_scope": "ffn"}),
    "int8": key({"draft_weights": "int8"}),
    "int8 ffn": key({"draft_weights": "int8", "draft_weights_scope": "ffn"}),
    "coarse": key({"sparsity": "coarse"}),
    "coarse ffn": key({"sparsity": "coarse", "draft_weights_scope": "ffn"}),
    "coarse int4": key({"sparsity": "coarse", "draft_weights": "int4"}),
    "fine": key({"sparsity": "fine"}),
    "fine shared": key({"sparsity": "fine", "draft_weights": "shared"}),
    "paper": key({"preset": "paper"}),
    "masked": key({"preset": "paper"}, native=False),
}


def test_engines_whose_graphs_differ_have_keys_of_their_own():
    assert len(set(DIFFERENT.values())) == len(DIFFERENT)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"kernel_size": 4}, "default"),
        ({"threshold": 0.5}, "default"),
        ({"adaptive": False, "prompt_lookup_tokens": 0}, "default"),
        ({"sparsity": "none"}, "default"),
        ({"draft_weights": "int4"}, "default"),
        ({"density": 0.3}, "coarse"),
        ({"refresh": False}, "coarse"),
        ({"sparsity": "coarse", "draft_weights": "shared", "kernel_size": 4}, "paper"),
    ],
)
def test_what_is_read_while_it_runs_changes_no_key(options, same):
    assert key(options) == DIFFERENT[same]


def test_what_is_decided_at_load_counts_and_not_what_was_written():
    assert key({}, copies=False) == key({"sparsity": "coarse", "draft_weights": "shared"}, copies=False)
    assert key({}, copies=False) == DIFFERENT["paper"]
    assert key({"density": 0.5}, native=False) == DIFFERENT["masked"]
