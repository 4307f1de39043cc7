"""Does the loaded model compute over a paged cache what transformers computes without one?

Two short random texts go through the model in two packed steps, their blocks scattered over a small
pool, and once more, whole, through transformers' own eager attention. Anything that the paged path
does not know about (position bias hidden in a mask, state carried from token to token, keys shared
between layers) shows as a difference, and the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from tierkv.cache.pools import GpuPool
from tierkv.errors import UnsupportedModelError
from tierkv.kernels.linear import PackedLinear
from tierkv.kernels.metadata import build_metadata
from tierkv.model import attention
from tierkv.model.inputs import StepInputs
from tierkv.model.loaded import LoadedModel
from tierkv.model.runner import ModelRunner
from tierkv.model.shard import is_shared

_LENGTHS = (40, 9)
_SPLITS = (23, 5)
_BLOCK_SIZE = 4
_NUM_BLOCKS = 17
_SEED = 20240229
_HALVES = (torch.bfloat16, torch.float16)

# 7 is prime to 17: consecutive logical blocks land far apart, and block 0 is nobody's.
_SCATTERED = [block * 7 % _NUM_BLOCKS for block in range(1, _NUM_BLOCKS)]
_TABLES = [_SCATTERED[:10], _SCATTERED[10:13]]

MAX_FLOAT32_DIFFERENCE = 1e-3
"""Largest difference of any logit, as a share of the logits' standard deviation, in fp32."""

MAX_HALF_DIFFERENCE = 0.15
"""The same for a median row's root mean square, where the model runs in half precision."""

_FLOAT32_PARAMETERS = 300_000_000
"""Half-precision models up to this size are probed in fp32, where a difference means something."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How far the paged logits are from transformers' own.

    Attributes:
        difference: as a share of the standard deviation of the reference logits.
        limit: the most that rounding explains.
    """

    difference: float
    limit: float

    @property
    def is_match(self) -> bool:
        return self.difference <= self.limit


def verify_model(loaded: LoadedModel) -> ProbeResult:
    """Probe the model.

    Raises:
        UnsupportedModelError: the logits differ by more than rounding, with the difference.
    """
    result = probe(loaded)
    if not result.is_match:
        name = type(loaded.model).__name__
        reason = (
            f"over a paged cache its logits differ from transformers' eager attention by "
            f"{result.difference:.2g} of their standard deviation (at most {result.limit:.0e} is "
            "rounding), so it would answer wrongly; verify_model=False serves it all the same"
        )
        raise UnsupportedModelError("model", name, reason)
    return result


@torch.inference_mode()
def probe(loaded: LoadedModel) -> ProbeResult:
    """Compare paged and eager logits of two random texts; the model is left as it was."""
    is_widened = loaded.dtype is not torch.float32 and _can_widen(loaded.model)
    if is_widened:
        loaded = replace(loaded, dtype=torch.float32)
    generator = torch.Generator().manual_seed(_SEED)
    texts = [torch.randint(0, loaded.vocab_size, (n,), generator=generator) for n in _LENGTHS]
    with _float32(loaded.model) if is_widened else nullcontext():
        expected = [_eager(loaded, text) for text in texts]
        found = _paged(loaded, texts)
    if loaded.dtype is torch.float32:
        return ProbeResult(_largest_difference(expected, found), MAX_FLOAT32_DIFFERENCE)
    return ProbeResult(_typical_difference(expected, found), MAX_HALF_DIFFERENCE)


def _can_widen(model: nn.Module) -> bool:
    """Small enough to be held in fp32 as well, and its weights still plain tensors."""
    num_parameters = sum(weight.numel() for weight in model.parameters())
    is_packed = any(isinstance(module, PackedLinear) for module in model.modules())
    is_plain = not is_packed and not any(map(is_shared, model.parameters()))
    return num_parameters <= _FLOAT32_PARAMETERS and is_plain


@contextmanager
def _float32(model: nn.Module) -> Iterator[None]:
    """Half-precision weights in fp32 for a while; the originals come back untouched.

    Those of a layer (an entry of a `ModuleList`) only while the layer runs, so that there is never
    a second, wider copy of the whole model.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = {layer for entries in lists for layer in entries}
    inside = {id(x) for layer in layers for x in _weights(layer)}
    with ExitStack() as stack:
        for layer in layers:
            widened: list[ExitStack] = []  # one for each call that has not returned
            enter = partial(_enter_layer, widened)
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            leave = layer.register_forward_hook(
                lambda *_, w=widened: w.pop().close(), always_call=True
            )
            stack.callback(leave.remove)
        stack.enter_context(_widened(x for x in _weights(model) if id(x) not in inside))
        yield


def _enter_layer(widened: list[ExitStack], layer: nn.Module, _: object) -> None:
    """A layer's forward begins: widen what is not wide yet."""
    widened.append(ExitStack())
    widened[-1].enter_context(_widened(_weights(layer)))


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    return chain(module.parameters(), module.buffers())


@contextmanager
def _widened(weights: Iterable[Tensor]) -> Iterator[None]:
    """The half-precision ones among the weights in fp32 for a while."""
    halves = [x for x in weights if x.dtype in _HALVES]
    originals = [x.data for x in halves]
    for x in halves:
        x.data = x.data.float()
    try:
        yield
    finally:
        for x, original in zip(halves, originals, strict=True):
            x.data = original


def _eager(loaded: LoadedModel, text: Tensor) -> Tensor:
    """fp32 `[len(text), vocab_size]` by transformers alone."""
    model = loaded.model
    model.set_attn_implementation("eager")
    try:
        inputs = text.to(loaded.device).unsqueeze(0)
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits[0].float()
        return logits
    finally:
        model.set_attn_implementation(attention.IMPLEMENTATION)


def _paged(loaded: LoadedModel, texts: list[Tensor]) -> list[Tensor]:
    """The same logits in two packed steps over scattered blocks."""
    pool = GpuPool(loaded.layout(_BLOCK_SIZE), _NUM_BLOCKS, loaded.device)
    runner = ModelRunner(loaded, pool)
    heads = _step(runner, texts, (0, 0), _SPLITS)
    tails = _step(runner, texts, _SPLITS, _LENGTHS)
    return [torch.cat(pair) for pair in zip(heads, tails, strict=True)]


def _step(
    runner: ModelRunner, texts: list[Tensor], starts: Sequence[int], ends: Sequence[int]
) -> tuple[Tensor, ...]:
    """Logits of tokens `[start, end)` of every text, in one forward."""
    device = runner.loaded.device
    lens = [end - start for start, end in zip(starts, ends, strict=True)]
    meta = build_metadata(lens, list(ends), _TABLES, _BLOCK_SIZE, device=device)
    pieces = [text[a:b] for text, a, b in zip(texts, starts, ends, strict=True)]
    inputs = StepInputs(
        input_ids=torch.cat(pieces).to(device).unsqueeze(0),
        position_ids=meta.positions.unsqueeze(0),
        meta=meta,
        logit_rows=torch.arange(sum(lens), device=device),
    )
    return torch.split(runner.forward(inputs), lens)


def _largest_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Of any logit, over the spread of the expected ones; NaN counts as infinite."""
    pairs = zip(expected, found, strict=True)
    worst = max(float((b - a).abs().max() / a.std()) for a, b in pairs)
    return worst if worst == worst else float("inf")


def _typical_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Of the median row of that quarter of the probe (text, step) which fits least.

    Rounding moves a few rows far (an expert chosen otherwise) and all rows a little; a mistake in
    attention moves every row behind some position.
    """
    worst = 0.0
    for a, b, split in zip(expected, found, _SPLITS, strict=True):
        error = (b - a).square().mean(-1).sqrt() / a.std()
        medians = [float(part.median()) for part in (error[:split], error[split:])]
        worst = max(worst, *(m if m == m else float("inf") for m in medians))
    return worst
