"""Which stored block was used last is known after a restart too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sick_tiers import Ward, prompts
from tiny_models import save_model

from tierkv.cache.hashing import pack_tokens
from tierkv.engine.core import EngineCore


@pytest.fixture
def ward(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ward]:
    made = Ward(monkeypatch)
    yield made
    made.release()


def used_blocks(ward: Ward) -> dict[bytes, tuple[int, float]]:
    """Hits and time of the last use of each stored block, by its tokens."""
    return {b.tokens: (b.hits, b.last_use) for b in ward.guards[-1].recover()}


def first_block(core: EngineCore, number: int) -> bytes:
    return pack_tokens(prompts()[number][: core.info.block_size])


def test_uses_of_stored_blocks_outlive_the_engine(ward: Ward, tmp_path: Path) -> None:
    core = ward.engine(save_model("llama", tmp_path / "model"), tmp_path / "kv")
    old, new = 0, next(n for n in range(1, 9) if prompts()[n][0] != prompts()[0][0])
    ward.play(core, [old])
    ward.settle(core)
    ward.play(core, [new])
    ward.settle(core)
    key = {number: first_block(core, number) for number in (old, new)}
    written = used_blocks(ward)
    assert written[key[old]][0] == 0 and written[key[old]][1] < written[key[new]][1]
    ward.play(core, [old])
    core.close()

    core = ward.engine(tmp_path / "model", tmp_path / "kv")
    found = used_blocks(ward)
    assert found[key[old]][0] == 1 and found[key[new]][0] == 0
    assert found[key[old]][1] > found[key[new]][1]
    core.close()
