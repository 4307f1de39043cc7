"""Temperature, min-p, top-k and top-p, and one draw, for many rows at once.

Nothing here waits for the device: what a row asks for goes there without waiting. A nucleus may be
wider than the candidates that were looked at. On a CPU whether it is comes back with the tokens,
and the row is drawn again. To read that from a GPU is to wait for it, so there every draw is final:
a kernel finds what such rows keep before a token is drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tierkv.kernels import ops
from tierkv.model.inputs import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from tierkv.engine.sampling_params import SamplingParams

NEVER = float("-inf")


def column(values: Seq[float], like: Tensor) -> Tensor:
    """`[len(values), 1]` of the dtype and device of `like`."""
    return to_device(torch.tensor(values, dtype=like.dtype), like.device).unsqueeze(1)


def ids(values: Seq[int], like: Tensor) -> Tensor:
    """int64 `[len(values)]` on the device of `like`."""
    return to_device(torch.tensor(values, dtype=torch.int64), like.device)


def resolves_on_device(device: torch.device) -> bool:
    """Is every draw final there, however wide its nucleus?"""
    return device.type == "cuda"


def may_stay_open(
    params: list[SamplingParams], vocab: int, num_candidates: int, device: torch.device
) -> bool:
    """Could a row with these parameters have to be drawn again among more candidates?

    Args:
        params: of rows that are drawn, which greedy ones are not.
        vocab: logits of a row.
        num_candidates: as `draw` is given.
        device: of the logits.
    """
    if vocab <= num_candidates or resolves_on_device(device):
        return False
    return any(p.top_p < 1.0 and not 0 < p.top_k < vocab for p in params)


def draw(
    logits: Tensor, params: list[SamplingParams], uniforms: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Tokens of every row, and which rows have to be drawn again among more candidates.

    Args:
        logits: `[rows, vocab]`; not modified.
        params: of each row; temperatures are above zero.
        uniforms: fp64 `[rows, num_samples]` in CPU memory, in [0, 1).
        num_candidates: tokens among which a nucleus is looked for, more where top-k has more.

    Returns:
        int64 `[rows, num_samples]`, and bool `[rows]`: the nucleus is wider, the tokens wrong; no
        row where `resolves_on_device`.
    """
    if any(p.temperature != 1.0 for p in params):
        logits = logits / column([p.temperature for p in params], logits)
    kept, is_open = _filtered(logits, params, num_candidates)
    # On a GPU the order of a sum may vary; in fp64 that does not reach the comparison.
    dtype = torch.float64 if logits.is_cuda else logits.dtype
    cdf = kept.softmax(-1).cumsum(-1, dtype=dtype)
    total = cdf[:, -1:]
    target = (to_device(uniforms, cdf.device) * total).to(cdf.dtype)
    # Below the total, so that the first entry above the target is a token with some mass.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cdf, target.contiguous(), right=True)
    return tokens.clamp_(max=cdf.shape[-1] - 1), is_open


def _filtered(
    scaled: Tensor, params: list[SamplingParams], num_candidates: int
) -> tuple[Tensor, Tensor]:
    """`scaled` `[rows, vocab]` with tokens outside min-p, top-k and top-p at -inf; open rows."""
    is_open = torch.zeros(len(params), dtype=torch.bool, device=scaled.device)
    if any(p.min_p > 0.0 for p in params):
        share = column([math.log(p.min_p) if p.min_p > 0.0 else NEVER for p in params], scaled)
        scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + share, NEVER)
    vocab = scaled.shape[-1]
    some = [i for i, p in enumerate(params) if 0 < p.top_k < vocab or p.top_p < 1.0]
    if not some:
        return scaled, is_open
    top_k = [params[i].top_k if 0 < params[i].top_k < vocab else vocab for i in some]
    top_p = [params[i].top_p for i in some]
    num = min(vocab, max(num_candidates, *(k for k in top_k if k < vocab), 0))
    if len(some) == len(params):
        floor, is_open = _thresholds(scaled, top_k, top_p, num)
    else:
        at = ids(some, scaled)
        floor = column([NEVER] * len(params), scaled)
        found, open_some = _thresholds(scaled.index_select(0, at), top_k, top_p, num)
        floor.index_copy_(0, at, found)
        is_open.index_copy_(0, at, open_some)
    return scaled.masked_fill(scaled < floor, NEVER), is_open


def _thresholds(
    scaled: Tensor, top_k: list[int], top_p: list[float], num: int
) -> tuple[Tensor, Tensor]:
    """The smallest logit that top-k and top-p (over what top-k leaves) keep, `[rows, 1]`, found
    among the `num` best tokens; and which rows need more than those, `[rows]`."""
    values = scaled.topk(num).values
    best = values[:, :1]
    limit = ids(top_k, scaled).unsqueeze(1)
    is_candidate = torch.arange(num, device=scaled.device) < limit
    weights = (values - best).exp() * is_candidate
    total = weights.sum(-1, keepdim=True)
    is_unlimited = limit > num
    has_unlimited = any(k > num for k in top_k)
    if has_unlimited:
        everything = (scaled.logsumexp(-1, keepdim=True) - best).exp()
        total = torch.where(is_unlimited, everything, total)
    # p = 1 keeps everything, whatever the rounding of the sums says.
    mass = column([p if p < 1.0 else math.inf for p in top_p], scaled) * total
    reached = weights.cumsum(-1)
    is_kept = is_candidate.clone()
    is_kept[:, 1:] &= reached[:, :-1] < mass
    last = is_kept.sum(-1, keepdim=True) - 1
    is_open = (is_unlimited & (reached[:, -1:] < mass)).squeeze(1)
    floor = values.gather(1, last)
    if has_unlimited and resolves_on_device(scaled.device):
        ops.widen_nuclei(scaled, best.squeeze(1), mass.squeeze(1), is_open, floor.squeeze(1))
        is_open = torch.zeros_like(is_open)
    return floor, is_open
