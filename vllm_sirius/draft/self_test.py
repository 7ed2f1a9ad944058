"""Proof, at start-up, that the draft really is a reduced target, on the kernels and the weights that it should read.

A switch without effect (a compiled graph that froze the mode, a module replaced after the switch was installed) would
draft with the dense target: correct, slow and silent.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from vllm_sirius.draft.backends import Backend
from vllm_sirius.draft.layer import ReducedFFNs
from vllm_sirius.draft.locate import GatedFFN
from vllm_sirius.draft.low_bit_linears import LowBitLinears, run_linear
from vllm_sirius.errors import SiriusIntegrationError

logger = logging.getLogger("vllm.sirius")

NUM_TOKENS = 4
"""As many as a draft step with prompt lookup has; a compiler would take 1 for a constant."""

SAME = 0.5
"""Part of its kernels' difference from the target that a layer must show in a draft."""

MOST_NAMED = 3
"""Layers that a text names; there may be hundreds."""

REMEDY = (
    "another plugin may have replaced the model's modules; report this with the model's name and the engine's options."
)


def backend_reproduces_ffns(
    ffns: Sequence[GatedFFN], backend: Backend, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the kernels with all neurons give what the model's own FFNs give.

    They do not where an FFN computes more than that, for example multiplies its output.

    Args:
        ffns: The FFNs, as the model has them.
        backend: The kernels.
        dtype: The model's dtype.
        device: Where it lives.

    Raises:
        SiriusIntegrationError: If an FFN of the model gives values that are not finite.
    """
    for layer, ffn in enumerate(ffns):
        hidden_states = _random_hidden_states(ffn.hidden_size, dtype, device)
        dense = ffn.module(hidden_states).float()
        _check_finite(f"the FFN {ffn.name!r}", dense, dtype)
        whole = backend.whole(layer, hidden_states).float()
        if not float((dense - whole).norm()) <= backend.max_error * float(dense.norm()):
            return False
    return True


@torch.no_grad()
def assert_draft_is_reduced(
    ffns: ReducedFFNs,
    draft_forward: Callable[[], object],
    dtype: torch.dtype,
    device: torch.device,
    never_called: Callable[[Sequence[nn.Module]], Collection[nn.Module]] = lambda layers: (),
) -> float:
    """Runs every layer that drafts run otherwise in both modes, then the whole model in the way drafts run it.

    Each layer must differ from the target's as far as its kernels do when they are called by themselves: how far that is
    depends on the weights, and may be nothing where the copy of a weight happens to be exact.

    Args:
        ffns: The switch. With coarse sparsity a selection must have been made.
        draft_forward: One forward pass of the whole model, logits included, as drafts run it.
        dtype: The model's dtype.
        device: Where it lives.
        never_called: Of some layers those that a pass of the model does not call: there are models that read a layer's weight
            themselves. Asked only about layers that did not run on their copies in the pass.

    Returns:
        Mean relative difference between the outputs of a reduced FFN and the dense one.

    Raises:
        SiriusIntegrationError: If a layer gives the target's result although its kernels give another, if a weight is
            damaged, or if a draft pass of the whole model does not run all FFNs reduced and on their kernels.
    """
    differences: list[float] = []

    def check_ffn(layer: int) -> None:
        differences.append(_difference_of_ffn(ffns, layer, dtype, device))

    steps: list[tuple[str, Callable[[], None]]] = []
    if ffns.linears is not None:
        steps += _checks_of_linears(ffns, ffns.linears, dtype, device)
    steps += [(ffn.name, functools.partial(check_ffn, layer)) for layer, ffn in enumerate(ffns.ffns)]
    # In the order of a pass: where the target is streamed from a disk, one stream serves them all. Layers end with their FFN.
    for _, check in sorted(steps, key=lambda step: _layer_number(step[0])):
        check()
    if ffns.linears is not None:
        _check_head(ffns, ffns.linears, dtype, device)
    _check_pass(ffns, draft_forward, never_called)
    return sum(differences) / len(differences)


def _layer_number(name: str) -> int:
    """Number of the decoder's layer that a module belongs to; modules outside of them come first."""
    found = re.search(r"\.(\d+)(?=\.|$)", name)
    return int(found[1]) if found else -1


def _difference_of_ffn(ffns: ReducedFFNs, layer: int, dtype: torch.dtype, device: torch.device) -> float:
    ffn = ffns.ffns[layer]
    hidden_states = _random_hidden_states(ffn.hidden_size, dtype, device)
    dense = ffn.module(hidden_states)
    _check_finite(f"the FFN {ffn.name!r}", dense, dtype)
    with ffns.draft_mode():
        draft = ffn.module(hidden_states)
    difference = _difference(dense, draft)
    if ffns.backend is not None:
        expected = _difference(dense, ffns.run_native(layer, hidden_states))
    else:
        # Neurons are masked: without them the output cannot be the same, unless it is nothing.
        expected = 1e-9 if ffns.density < 1.0 and bool(dense.any()) else 0.0
    if not difference >= SAME * expected:
        what = "with all its neurons" if ffns.density < 1.0 else "on the target's own weights"
        raise SiriusIntegrationError(
            f"self-test: the FFN {ffn.name!r} drafts {what} (it differs from the target by {100 * difference:.1f}%, its "
            f"kernels by {100 * expected:.1f}%): {REMEDY}"
        )
    return difference


def _checks_of_linears(
    ffns: ReducedFFNs, linears: LowBitLinears, dtype: torch.dtype, device: torch.device
) -> list[tuple[str, Callable[[], None]]]:
    """The checks of all layers outside of the FFNs but the lm_head, by name."""
    found: list[tuple[str, Callable[[], None]]] = []
    run: Any
    for index, layer in enumerate(linears.layers):
        run, name = layer, _name(linears, index)
        own = functools.partial(linears.run, index)
        check = functools.partial(_check_linear, ffns, name, run, own, linears.width(index), dtype, device)
        found.append((name, check))
    return found


def _check_head(ffns: ReducedFFNs, linears: LowBitLinears, dtype: torch.dtype, device: torch.device) -> None:
    run: Any
    if linears.head is not None:
        head: Any = linears.head[0]
        weight = linears.head[1]
        run = functools.partial(head.quant_method.apply, head)
        _check_linear(ffns, "lm_head", run, lambda inputs: run_linear(inputs, weight), weight.width, dtype, device)


def _check_linear(
    ffns: ReducedFFNs,
    name: str,
    run: Callable[[torch.Tensor], Any],
    run_copy: Callable[[torch.Tensor], torch.Tensor],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    inputs = _random_hidden_states(width, dtype, device)
    dense = _output(run(inputs))
    _check_finite(f"the layer {name!r}", dense, dtype)
    with ffns.draft_mode():
        draft = _output(run(inputs))
    difference, expected = _difference(dense, draft), _difference(dense, run_copy(inputs))
    if not difference >= SAME * expected:
        raise SiriusIntegrationError(
            f"self-test: the layer {name!r} drafts on the target's own weights (it differs from the target by "
            f"{100 * difference:.1f}%, its quantised copy by {100 * expected:.1f}%): {REMEDY}"
        )


def _check_pass(
    ffns: ReducedFFNs,
    draft_forward: Callable[[], object],
    never_called: Callable[[Sequence[nn.Module]], Collection[nn.Module]],
) -> None:
    linears, count = ffns.linears, len(ffns.ffns)
    reduced, native = ffns.num_draft_calls, ffns.num_native_calls
    copies, heads = (list(linears.num_calls), linears.num_head_calls) if linears is not None else ([], 0)
    draft_forward()
    reduced, native = ffns.num_draft_calls - reduced, ffns.num_native_calls - native
    if reduced != count:
        raise SiriusIntegrationError(f"self-test: a draft pass ran {reduced} of {count} FFNs reduced: {REMEDY}")
    if ffns.backend is not None and native != count:
        raise SiriusIntegrationError(
            f"self-test: a draft pass ran {native} of {count} FFNs on the draft's kernels: {REMEDY}"
        )
    if linears is None:
        return
    _check_copies_were_read(linears, copies, never_called)
    if linears.head is not None and linears.num_head_calls == heads:
        raise SiriusIntegrationError(f"self-test: a draft pass did not run the lm_head on its copy: {REMEDY}")


def _check_copies_were_read(
    linears: LowBitLinears,
    calls_before: list[int],
    never_called: Callable[[Sequence[nn.Module]], Collection[nn.Module]],
) -> None:
    """Each layer must have run on its copy, once or more often, unless the model would not call it."""
    unread = [
        index
        for index, (before, after) in enumerate(zip(calls_before, linears.num_calls, strict=True))
        if after == before
    ]
    if not unread:
        return
    idle = set(never_called([linears.layers[index] for index in unread]))
    wrong = [_name(linears, index) for index in unread if linears.layers[index] not in idle]
    if wrong:
        count = len(linears.layers) - len(idle)
        raise SiriusIntegrationError(
            f"self-test: a draft pass ran {count - len(wrong)} of {count} linear layers on their quantised copies, and not "
            f"{_listed(wrong)}: {REMEDY}"
        )
    logger.info(
        "Sirius: drafts do not read the quantised copies of %d linear layers, which no pass of a few tokens calls: %s",
        len(idle),
        _listed([_name(linears, index) for index in unread]),
    )


def _name(linears: LowBitLinears, index: int) -> str:
    return str(getattr(linears.layers[index], "prefix", "") or f"number {index}")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(map(repr, names[:MOST_NAMED])) + (f" and {more} more" if more > 0 else "")


def _check_finite(what: str, output: torch.Tensor, dtype: torch.dtype) -> None:
    """Weights that are not finite are refused when they are loaded; those that are can still be too large for the dtype."""
    if not bool(output.isfinite().all()):
        raise SiriusIntegrationError(
            f"self-test: {what} of the target gives numbers that are not finite: its weights hold NaN or infinity, or are "
            f"too large for {dtype}. Check the checkpoint, or serve it with another dtype."
        )


def _difference(dense: torch.Tensor, draft: torch.Tensor) -> float:
    return float((dense.float() - draft.float()).norm() / dense.float().norm().clamp_min(1e-9))


def _output(result: Any) -> torch.Tensor:
    """The output of a layer that may return its bias beside it."""
    output: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _random_hidden_states(hidden_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    hidden_states = torch.randn(NUM_TOKENS, hidden_size, generator=torch.Generator().manual_seed(0))
    return hidden_states.to(device, dtype)
