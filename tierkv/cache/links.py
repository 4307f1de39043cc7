"""What a mover with threads is made of: memory in slots, and queues of moves that wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tierkv.kernels import ops
from tierkv.storage.arena import HostArena
from tierkv.types import Move, MovePriority


class Memory:
    """Blocks in memory.

    Attributes:
        rows: uint8 `[num_slots, block_bytes]`, the blocks.
        slots: uint8 `[num_slots, stride]`, with their padding.
    """

    def __init__(self, slots: np.ndarray[Any, np.dtype[np.uint8]], block_bytes: int) -> None:
        self.slots = slots
        self.rows = torch.from_numpy(slots)[:, :block_bytes]

    @classmethod
    def of(cls, arena: HostArena) -> Memory:
        return cls(arena.array, arena.block_bytes)

    def view(self, slot: int) -> memoryview:
        """The slot's bytes, with its padding."""
        return memoryview(self.slots[slot])


def copy_rows(source: Memory, froms: list[int], destination: Memory, tos: list[int]) -> None:
    """Copy blocks without holding the interpreter lock."""
    if froms:
        ids = torch.tensor([froms, tos])
        ops.copy_rows(source.rows, ids[0], destination.rows, ids[1])


class Link:
    """Moves and erasures that wait for the same threads.

    Args:
        batch_moves: how many moves a thread takes at once.
    """

    def __init__(self, batch_moves: int) -> None:
        self._batch_moves = batch_moves
        self._waiting: list[deque[Move]] = [deque() for _ in MovePriority]
        self._erased: list[int] = []
        self._is_closed = False
        self._changed = threading.Condition()

    def try_put(self, moves: Sequence[Move], erased: Sequence[int] = ()) -> bool:
        """Queue moves, and slots to erase; False, and nothing happens, when it is closed."""
        with self._changed:
            if self._is_closed:
                return False
            for move in moves:
                self._waiting[move.priority].append(move)
            self._erased.extend(erased)
            self._changed.notify_all()
            return True

    def take(self) -> tuple[list[int], list[Move]]:
        """Wait for slots to erase and the most urgent moves, all of one priority; nothing of
        either once the link is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._erased or any(self._waiting))
            erased, self._erased = self._erased, []
            return erased, self._most_urgent()

    def take_now(self) -> list[Move]:
        """The most urgent moves, all of one priority; none when none waits."""
        with self._changed:
            return self._most_urgent()

    def _most_urgent(self) -> list[Move]:
        queue = next(filter(None, self._waiting), None) or deque[Move]()
        return [queue.popleft() for _ in range(min(len(queue), self._batch_moves))]

    def close(self) -> None:
        """What waits is still served; nothing is added."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def drain(self) -> tuple[list[int], list[Move]]:
        """What no thread took; closes the link."""
        self.close()
        with self._changed:
            erased, self._erased = self._erased, []
            left = [move for queue in self._waiting for move in queue]
            self._waiting = [deque() for _ in MovePriority]
            return erased, left
