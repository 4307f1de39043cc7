"""A tier's slots as at most a thousand cells, for a window that draws them.

A cell is a byte: what most of its occupied slots are (the lower three bits: a code below, 0 for
empty), whether any of them is filling or draining (bit 3), and how many are occupied, in
fifteenths (the upper four bits). Of a cell with very many slots only every n-th is looked at, so
that the cost hardly grows with the tier.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tierkv.cache.residency import CopyState, Tier
from tierkv.engine.holders import Holders

MOST_CELLS = 1024
LOOKED_AT = 32  # slots of a cell, or a few more
EMPTY, FILLING, CACHED, DRAINING, IN_USE = range(5)
"""What a slot is. The first four are `CopyState.code`; IN_USE is one that a sequence holds and
has computed or loaded, CACHED a ready one that nobody holds."""

BUSY = 8
LEVELS = 15
_NUM_CODES = 8

_Array = np.ndarray[Any, np.dtype[Any]]


class TierCells:
    """The cells of one tier.

    Args:
        tier: its slots.
        holders: who holds them; of the pool only.
    """

    def __init__(self, tier: Tier, holders: Holders | None = None) -> None:
        self.name = tier.name.value
        self._tier = tier
        self._holders = holders
        self._states = np.frombuffer(tier.slot_states, np.uint8)
        size = max(1, -(-tier.capacity // MOST_CELLS))
        self._step = max(1, size // LOOKED_AT)
        self._per_cell = -(-size // self._step)
        self.slots_per_cell = self._per_cell * self._step
        self._num_cells = -(-tier.capacity // self.slots_per_cell)
        self._firsts = np.arange(self._num_cells) * self._per_cell
        self._codes_of = np.repeat(np.arange(self._num_cells) * _NUM_CODES, self._per_cell)

    def snapshot(self) -> dict[str, Any]:
        """Exact counts of the tier, and its cells."""
        counts, in_use, unsealed = self._tier.counts, 0, 0
        if self._holders is not None:
            held = self._holders.counts > 0
            is_unsealed = _is_unsealed(self._states, held, self._holders.complete)
            unsealed = int(np.count_nonzero(is_unsealed))
            in_use = int(np.count_nonzero(held & (self._states == CACHED))) + unsealed
        cells, owners = self._cells()
        return {
            "name": self.name,
            "capacity": self._tier.capacity,
            "empty": counts[CopyState.EMPTY],
            "filling": counts[CopyState.FILLING] - unsealed,
            "in_use": in_use,
            "cached": counts[CopyState.READY] - (in_use - unsealed),
            "draining": counts[CopyState.DRAINING],
            "slots_per_cell": self.slots_per_cell,
            "cells": cells,
            "owners": owners,
        }

    def _cells(self) -> tuple[bytes, bytes]:
        states, owners = self._sample(self._states), b""
        if self._holders is not None:
            held = self._sample(self._holders.counts) > 0
            is_used = held & (states == CACHED)
            is_used |= _is_unsealed(states, held, self._sample(self._holders.complete))
            states[is_used] = IN_USE
            whose = self._sample(self._holders.owners)
            whose[~held] = 0
            owners = np.maximum.reduceat(whose, self._firsts).astype("<u2").tobytes()
        return self._pack(states), owners

    def _sample(self, slots: _Array) -> _Array:
        """Every n-th slot, as many for each cell; the last cell may repeat its last."""
        found: _Array = np.empty(self._num_cells * self._per_cell, slots.dtype)
        chosen = slots[:: self._step]
        found[: len(chosen)] = chosen
        found[len(chosen) :] = chosen[-1]
        return found

    def _pack(self, states: _Array) -> bytes:
        flat = np.bincount(self._codes_of + states, minlength=self._num_cells * _NUM_CODES)
        counts = flat.reshape(self._num_cells, _NUM_CODES)
        occupied = self._per_cell - counts[:, EMPTY]
        main = np.where(occupied > 0, counts[:, 1:].argmax(axis=1) + 1, EMPTY)
        busy = np.where(counts[:, FILLING] + counts[:, DRAINING] > 0, BUSY, 0)
        level = -(-occupied * LEVELS // self._per_cell)
        packed: bytes = (main | busy | level << 4).astype(np.uint8).tobytes()
        return packed


def _is_unsealed(states: _Array, held: _Array, complete: _Array) -> _Array:
    """Computed in full and held, but not public: without prefix caching, all of them."""
    found: _Array = (states == FILLING) & held & complete
    return found
