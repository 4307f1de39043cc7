"""Every family's logits over a paged cache against transformers' eager attention, in fp32.

Texts are longer than a chunk and than the windows, several run packed in one step, prefill chunks
and decode rows together, over blocks in random order.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_steps import eager_logits, load_tiny, make_runner, random_texts, run_chunked
from tiny_models import FAMILIES, VOCAB_SIZE, save_model

TEXTS = random_texts((61, 7, 38, 1), VOCAB_SIZE)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_eager(family: str, tmp_path: Path) -> None:
    loaded = load_tiny(save_model(family, tmp_path))
    expected = [eager_logits(loaded, text) for text in TEXTS]
    for block_size, num_blocks in ((1, 120), (16, 12), (64, 6)):
        runner = make_runner(loaded, block_size, num_blocks)
        found = run_chunked(runner, TEXTS, max_chunk=24, seed=block_size)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0.0, atol=1e-4)
