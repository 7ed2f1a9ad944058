"""Finds NaN and infinite values among a target's weights, of which no copy, scale or norm could be made."""

from __future__ import annotations

import math

import torch
from torch import nn

from vllm_sirius.draft.locate import language_model
from vllm_sirius.errors import SiriusUnsupportedError

MOST_NAMED = 3
"""Weights that the refusal names; a broken checkpoint may have hundreds."""


class FiniteWeights:
    """Collects the weights that are not finite, so that one error can name them once all are loaded."""

    def __init__(self) -> None:
        self._faults: dict[str, str] = {}

    def check(self, layer: str, weight: torch.Tensor, parameter: str = "weight") -> None:
        """Looks at one weight.

        Args:
            layer: Path of its layer.
            weight: The weight, floating point.
            parameter: Its name in the layer.
        """
        if weight.numel() == 0 or weight.is_meta:
            return
        # Both ends of a tensor with a NaN are NaN.
        ends = [float(end) for end in torch.aminmax(weight)]
        if any(map(math.isnan, ends)):
            self._faults[f"{layer}.{parameter}"] = "NaN"
        elif any(map(math.isinf, ends)):
            self._faults[f"{layer}.{parameter}"] = "infinite values"

    def check_small(self, model: nn.Module) -> None:
        """Looks at norms and biases, which no reader sees.

        Args:
            model: The model.
        """
        for name, module in language_model(model).named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1 and parameter.is_floating_point():
                    self.check(getattr(module, "prefix", "") or name, parameter.data, key)

    def raise_if_not(self) -> None:
        """Refuses what was found.

        Raises:
            SiriusUnsupportedError: If any weight is not finite.
        """
        if not self._faults:
            return
        named = [f"{name} ({what})" for name, what in self._faults.items()][:MOST_NAMED]
        more = len(self._faults) - len(named)
        raise SiriusUnsupportedError(
            f"weights of the checkpoint are not finite: {', '.join(named)}{f' and {more} more' if more else ''}. Drafts cannot "
            "be made of them, and the model itself would answer with nonsense: repair or download the checkpoint again, or, "
            "where its values overflow the engine's dtype, serve it with dtype='bfloat16' or 'float32'."
        )
