"""A caller that chooses every token itself: it forks, advances and drops sequences as it likes."""

from __future__ import annotations

from random import Random

from tierkv.engine.core import EngineCore
from tierkv.engine.outputs import SequenceOutput
from tierkv.errors import InvariantError, RequestError
from tierkv.sim.chaos.contents import NUM_CANDIDATES, next_token, state_of

_MOST_LIVE = 3


class Beam:
    """One stepped request.

    Args:
        name, prompt, salt: of it.
        depth: tokens after which a sequence is dropped.
        rng: chooses.

    Attributes:
        tokens: what has been chosen for each live sequence.
        num_forks: sequences forked off.
        is_aborted: somebody wanted its end.
    """

    def __init__(self, name: str, prompt: list[int], salt: str, depth: int, rng: Random) -> None:
        self.name = name
        self.num_forks = 0
        self.is_aborted = False
        self.tokens: dict[int, list[int]] = {}
        self._prompt, self._salt, self._depth = prompt, salt, depth
        self._rng = rng

    def take(self, output: SequenceOutput, core: EngineCore) -> None:
        """A sequence has candidates for its next token: check them, and go on."""
        if output.finish_reason is not None:
            if not self.is_aborted:
                raise InvariantError(f"{self.name} ended by {output.finish_reason.value}")
            self.tokens.pop(output.seq_id, None)
            return
        so_far = self.tokens.setdefault(output.seq_id, [])
        state = state_of(self._salt, [*self._prompt, *so_far])
        expected = list(dict.fromkeys(next_token(state, i) for i in range(NUM_CANDIDATES)))
        found = [token for logprobs in output.logprobs or [] for token in logprobs]
        if found != expected:
            raise InvariantError(f"{self.name} may go on by {found}, not {expected}")
        self._choose(output.seq_id, found, core)

    def _choose(self, seq_id: int, candidates: list[int], core: EngineCore) -> None:
        so_far = self.tokens[seq_id]
        if len(so_far) >= self._depth or (len(self.tokens) > 1 and self._rng.random() < 0.2):
            core.drop(seq_id)
            del self.tokens[seq_id]
            return
        for token in candidates[1:]:
            if len(self.tokens) < _MOST_LIVE and self._rng.random() < 0.4:
                self._fork(seq_id, token, core)
        core.advance(seq_id, candidates[0])
        self.tokens[seq_id] = [*so_far, candidates[0]]

    def _fork(self, seq_id: int, token: int, core: EngineCore) -> None:
        try:
            child = core.fork(seq_id, token)
        except RequestError:
            return  # the engine runs no more
        self.num_forks += 1
        self.tokens[child] = [*self.tokens[seq_id], token]
