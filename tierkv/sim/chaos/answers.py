"""What was asked, what must be answered, and what was.

Every token must be the one that the request's own history gives; every sequence ends once, for a
reason that there is, and says nothing after it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tierkv.engine.core import EngineCore
from tierkv.engine.outputs import SequenceOutput
from tierkv.errors import InvariantError
from tierkv.sim.chaos.beams import Beam
from tierkv.sim.chaos.contents import answer
from tierkv.types import FinishReason


@dataclass(slots=True)
class Asked:
    """A request.

    Attributes:
        prompt, salt, max_tokens, n, stop: of it.
        got: tokens by sequence.
        ended: how each sequence ended.
        stopped: sequences that the front end stopped, which say nothing more.
        is_aborted: somebody wanted its end.
        is_cut: its engine ended before it did.
    """

    name: str
    prompt: list[int]
    salt: str
    max_tokens: int
    n: int
    stop: frozenset[int]
    got: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, FinishReason] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)
    is_aborted: bool = False
    is_cut: bool = False
    _expected: dict[int, list[int]] = field(default_factory=dict)

    def expected(self, index: int) -> list[int]:
        """All that a sequence of it will say, unless it is stopped."""
        if index not in self._expected:
            self._expected[index] = answer(
                self.salt, self.prompt, self.max_tokens, index, self.stop
            )
        return self._expected[index]

    def take(self, output: SequenceOutput) -> None:
        """News of one of its sequences."""
        index, who = output.index, f"{self.name}[{output.index}]"
        if index in self.ended or index in self.stopped or self.is_cut:
            raise InvariantError(f"{who} has ended, and goes on")
        got = self.got.setdefault(index, [])
        got += output.new_token_ids
        expected = self.expected(index)
        if got != expected[: len(got)]:
            raise InvariantError(f"{who} is {got}, not {expected}")
        if output.finish_reason is not None:
            self._end(index, output.finish_reason, got == expected, who)

    def _end(self, index: int, reason: FinishReason, is_whole: bool, who: str) -> None:
        self.ended[index] = reason
        got = self.got[index]
        is_stopped = bool(got) and got[-1] in self.stop
        is_right = {
            FinishReason.ABORT: self.is_aborted,
            FinishReason.STOP: is_whole and is_stopped,
            FinishReason.LENGTH: is_whole and not is_stopped,
        }
        if not is_right[reason]:
            raise InvariantError(f"{who} ended by {reason.value} after {len(got)} tokens")

    @property
    def is_over(self) -> bool:
        """All its sequences have ended; those that would have been forked later are missing when
        it was ended from outside."""
        known = self.ended.keys() | self.stopped
        is_short = known == {0} and (self.is_aborted or 0 in self.stopped)
        return known == set(range(self.n)) or is_short

    def check_end(self) -> None:
        if not self.is_cut and not self.is_over:
            raise InvariantError(f"{self.name}: of {self.n} sequences {sorted(self.ended)} ended")


class Answers:
    """All requests of a run.

    Attributes:
        asked: by name.
        beams: those whose tokens their callers choose.
        num_news: tokens and ends that have come.
    """

    def __init__(self) -> None:
        self.asked: dict[str, Asked] = {}
        self.beams: dict[str, Beam] = {}
        self.num_news = 0

    @property
    def new_name(self) -> str:
        return f"r{len(self.asked) + len(self.beams)}"

    def add(self, asked: Asked) -> None:
        self.asked[asked.name] = asked

    def take(self, outputs: list[SequenceOutput], core: EngineCore) -> None:
        for output in outputs:
            if (beam := self.beams.get(output.request_id)) is not None:
                self.num_news += 1
                beam.take(output, core)
            else:
                self.num_news += len(output.new_token_ids) + (output.finish_reason is not None)
                self.asked[output.request_id].take(output)

    def aborted(self, name: str) -> None:
        """Somebody wants the end of a request."""
        (self.beams.get(name) or self.asked[name]).is_aborted = True

    def cut(self) -> None:
        """The engine ended, and with it what it had not answered."""
        for asked in self.asked.values():
            asked.is_cut = asked.is_cut or not asked.is_over
        for beam in self.beams.values():
            beam.tokens.clear()

    def chats(self) -> list[tuple[str, list[int]]]:
        """Conversations that can be continued: whose they are, and all their tokens."""
        return [
            (asked.salt, asked.prompt + asked.got[0])
            for asked in self.asked.values()
            if asked.ended.get(0) in (FinishReason.LENGTH, FinishReason.STOP)
        ]

    def check_ends(self) -> None:
        for asked in self.asked.values():
            asked.check_end()
        for beam in self.beams.values():
            if beam.tokens:
                raise InvariantError(f"{beam.name}: sequences {[*beam.tokens]} wait for ever")

    def tally(self) -> Counter[str]:
        """How many there were of the rarer kinds."""
        forked = sum(max(0, len(asked.got) - 1) for asked in self.asked.values())
        beams = sum(beam.num_forks for beam in self.beams.values())
        return Counter({"samples forked": forked, "beams forked": beams})
