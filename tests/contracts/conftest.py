"""Worlds of movers, for the suites that look at the one with threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from mover_worlds import EVEN, CudaWorld, GatedStore, ThreadWorld, mem

from tierkv.cache.layout import KVLayout


@pytest.fixture(params=[ThreadWorld, CudaWorld])
def worlds(request: pytest.FixtureRequest) -> Iterator[Callable[..., ThreadWorld]]:
    """Makes worlds with threads, whose pool is in memory or on a fake GPU; closed at the end."""
    made: list[ThreadWorld] = []

    def make(*args: object, **options: object) -> ThreadWorld:
        made.append(request.param(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def gated(worlds) -> Iterator[Callable[..., ThreadWorld]]:
    """Makes worlds whose store waits; opened at the end."""
    stores: list[GatedStore] = []

    def make(layout: KVLayout = EVEN, **options: object) -> ThreadWorld:
        stores.append(GatedStore(mem(layout)))
        return worlds(layout, stores[-1], **options)

    yield make
    for store in stores:
        store.opened.set()
