"""Picks the tokens of each request after acceptance, as one Triton kernel: nothing waits for the device.

For Model Runner V2, where a request's rows of logits follow each other and the draft that a row judges is the input token
of the next row. The rules that say which drafts are accepted are in `acceptance`.
"""

from __future__ import annotations

import torch

from vllm_sirius.kernels.triton.runtime import jit, require_triton, tl


def pick_tokens(
    own_token_ids: torch.Tensor,
    draft_token_ids: torch.Tensor,
    accepted: torch.Tensor,
    cu_num_logits: torch.Tensor,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Emits for each request its accepted drafts and then one token of the target's own.

    Args:
        own_token_ids: What the target itself emits at each row, ``int64 [rows]``.
        draft_token_ids: The draft that each row judges, ``int64 [rows]``; anything in a request's last row.
        accepted: Whether each draft passes, seen on its own, ``bool [rows]``; a request's last row never passes.
        cu_num_logits: Where the rows of each request begin, ``int32 [requests + 1]``.
        width: Most rows of a request.

    Returns:
        Tokens ``int64 [requests, width]``, filled up with -1, and their number ``int32 [requests]``, which is 0 for a
        request without rows.

    Raises:
        TritonUnavailableError: If Triton cannot run here.
    """
    require_triton(own_token_ids)
    num_requests = cu_num_logits.shape[0] - 1
    sampled = torch.empty(num_requests, width, dtype=torch.int64, device=own_token_ids.device)
    num_sampled = torch.empty(num_requests, dtype=torch.int32, device=own_token_ids.device)
    if num_requests > 0:
        pick_tokens_kernel[(num_requests,)](
            own_token_ids.contiguous(),
            draft_token_ids.contiguous(),
            accepted.contiguous(),
            cu_num_logits.contiguous(),
            sampled,
            num_sampled,
            width,
            block=1 << max(width - 1, 0).bit_length(),
            num_warps=1,
        )
    return sampled, num_sampled


def pick_tokens_reference(
    own_token_ids: torch.Tensor,
    draft_token_ids: torch.Tensor,
    accepted: torch.Tensor,
    cu_num_logits: torch.Tensor,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch twin of `pick_tokens`; arguments and results as there."""
    place = torch.arange(width, device=own_token_ids.device)
    count = cu_num_logits.diff().unsqueeze(1)
    row = (cu_num_logits[:-1].unsqueeze(1) + place).clamp_max(max(own_token_ids.shape[0] - 1, 0)).long()
    if own_token_ids.shape[0] == 0:
        own = draft = torch.full(row.shape, -1, dtype=torch.int64, device=own_token_ids.device)
        passes = torch.zeros(row.shape, dtype=torch.bool, device=own_token_ids.device)
    else:
        own, draft, passes = own_token_ids[row], draft_token_ids[row], accepted[row]
    passes = passes & (place < count - 1)
    num_accepted = passes.int().cumprod(dim=1).sum(dim=1, keepdim=True)
    sampled = torch.where(place < num_accepted, draft, own).masked_fill((place > num_accepted) | (count == 0), -1)
    num_sampled = torch.where(count > 0, num_accepted + 1, 0).squeeze(1)
    return sampled.to(torch.int64), num_sampled.to(torch.int32)


@jit
def pick_tokens_kernel(
    own_token_ids: tl.tensor,
    draft_token_ids: tl.tensor,
    accepted: tl.tensor,
    cu_num_logits: tl.tensor,
    sampled: tl.tensor,
    num_sampled: tl.tensor,
    width: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Writes the tokens of one request. Programs: (requests). `block` covers `width`."""
    request = tl.program_id(0)
    begin = tl.load(cu_num_logits + request)
    count = tl.load(cu_num_logits + request + 1) - begin
    place = tl.arange(0, block)
    inside = place < count
    passes = tl.load(accepted + begin + place, mask=inside, other=0) != 0
    stops = (passes == 0) | (place >= count - 1)
    num_accepted = tl.min(tl.where(stops, place, block), axis=0)
    draft = tl.load(draft_token_ids + begin + place, mask=inside, other=-1).to(tl.int64)
    own = tl.load(own_token_ids + begin + place, mask=inside, other=-1).to(tl.int64)
    token = tl.where(place < num_accepted, draft, tl.where(place == num_accepted, own, -1))
    tl.store(sampled + request.to(tl.int64) * width + place, token, mask=place < width)
    tl.store(num_sampled + request, tl.where(count > 0, num_accepted + 1, 0))
