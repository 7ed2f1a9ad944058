"""The target's own bf16 weights in the order that the kernel for a few tokens reads them; the plain PyTorch twin of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sirius.weights.memory import empty_on_huge_pages

OUTPUTS = 16
"""Outputs of a panel: as many as a vector register holds fp32 sums."""


def panels_shape(num_outputs: int, width: int) -> tuple[int, int, int, int]:
    """Shape of the panels of a weight.

    Args:
        num_outputs: Outputs of the layer.
        width: Inputs of the layer.
    """
    return -(-num_outputs // OUTPUTS), -(-width // 2), OUTPUTS, 2


@dataclass(frozen=True)
class Panels:
    """The weight of a linear layer, every value as it was.

    Attributes:
        weights: ``bfloat16 [panels, pairs, 16, 2]``, contiguous, on CPU: pairs of inputs of 16 outputs. What fills the last
            panel and the last pair is zero.
        num_outputs: Outputs of the layer.
        width: Inputs of the layer.
    """

    weights: torch.Tensor
    num_outputs: int
    width: int

    @classmethod
    def pack(cls, weight: torch.Tensor) -> Panels:
        """Puts a weight into panels.

        Args:
            weight: ``bfloat16 [out, in]`` on CPU.

        Raises:
            ValueError: If it is something else or has no elements.
        """
        if weight.dim() != 2 or weight.dtype != torch.bfloat16 or not weight.is_cpu or weight.numel() == 0:
            raise ValueError(f"panels hold bfloat16 [out, in] on CPU, not {weight.dtype} {list(weight.shape)}")
        num_outputs, width = weight.shape
        packed = cls.empty(num_outputs, width)
        weights, (num_panels, num_pairs, _, _) = packed.weights, packed.weights.shape
        if width % 2:
            weight = torch.nn.functional.pad(weight, (0, 1))
        # A pair is moved as one 32-bit number.
        pairs, target = weight.contiguous().view(torch.int32), weights.view(torch.int32).squeeze(-1)
        whole = num_outputs // OUTPUTS
        target[:whole] = pairs[: whole * OUTPUTS].view(whole, OUTPUTS, num_pairs).transpose(1, 2)
        if whole < num_panels:
            target[whole].zero_()[:, : num_outputs % OUTPUTS] = pairs[whole * OUTPUTS :].T
        return packed

    @classmethod
    def empty(cls, num_outputs: int, width: int) -> Panels:
        """Allocates panels whose values are to be read from elsewhere.

        Args:
            num_outputs: Outputs of the layer.
            width: Inputs of the layer.
        """
        shape = panels_shape(num_outputs, width)
        return cls(empty_on_huge_pages(shape, torch.bfloat16), num_outputs, width)

    def unpack(self) -> torch.Tensor:
        """Returns the weight, ``bfloat16 [out, in]``."""
        rows = self.weights.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        return rows[: self.num_outputs, : self.width].contiguous()


def panel_linear_reference(inputs: torch.Tensor, panels: Panels, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What the kernel computes: products, sums and bias in fp32, rounded once.

    The kernel adds in the order of the inputs, so that a result may lie one unit in the last place apart.

    Args:
        inputs: ``bfloat16 [tokens, in]``.
        panels: The weight.
        bias: ``[out]`` or ``None``.

    Returns:
        ``bfloat16 [tokens, out]``.
    """
    output = inputs.float() @ panels.unpack().float().T
    return (output if bias is None else output + bias.float()).to(inputs.dtype)
