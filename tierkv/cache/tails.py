"""Private tails of swapped sequences: the one block of each that is not full.

A tail belongs to its sequence alone. It goes down when the sequence is swapped out and comes back
when it is resumed; when either fails, its tokens are computed again. Whoever gives a tail up while
a move still reads or writes it leaves it here until the move has ended.
"""

from __future__ import annotations

from tierkv.cache.evictor import GPU
from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState, Residency


class Tails:
    """Frees private blocks that nobody wants any more."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self.kept: dict[bytes, Block] = {}
        self._given_up: dict[bytes, Block] = {}

    @property
    def blocks(self) -> list[Block]:
        """Tails outside any sequence's block table: swapped out, or waiting for a move to end."""
        return [*self.kept.values(), *self._given_up.values()]

    def keep(self, tail: Block) -> None:
        """The tail has left its sequence's block table and will come back."""
        self.kept[tail.key] = tail

    def take(self, tail: Block) -> None:
        """The tail is in its sequence's block table again."""
        del self.kept[tail.key]

    def give_up(self, tail: Block) -> None:
        """Nobody will come back for it."""
        self.kept.pop(tail.key, None)
        self._given_up[tail.key] = tail
        self.collect(tail)

    def collect(self, tail: Block) -> None:
        """Free what no move uses of a tail that was given up."""
        if tail.key not in self._given_up:
            return
        for tier, copy in list(tail.copies.items()):
            if not copy.readers and (copy.state is CopyState.READY):
                self._residency.drop(tail, tier)
        if not tail.copies:
            del self._given_up[tail.key]

    def came_back(self, tail: Block) -> None:
        """The tail is in the pool again, and nowhere else."""
        for tier, copy in list(tail.copies.items()):
            if tier is not GPU and not copy.readers:
                self._residency.drop(tail, tier)

    def move_ended(self, tail: Block) -> None:
        """A move of the tail ended, either way."""
        self.collect(tail)
        if tail.key in self.kept and GPU in tail.copies and not tail.copies[GPU].readers:
            self._residency.drop(tail, GPU)  # it could not go down: its sequence finds no copy
