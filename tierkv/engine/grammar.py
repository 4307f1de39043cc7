"""From what an output has to be to matchers that say, token by token, what may come next.

`llguidance` does the work. It compiles in threads of its own, without Python's lock, so that a
large schema holds up the request that brought it and no other. What compiles is bounded: by the
length of its text, by llguidance's limits on states and on work, and by the time that the first
token's mask takes, since masks are computed in the engine's step.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from tierkv.engine.grammar_params import FIELD, WHITESPACE, StructuredOutputsParams
from tierkv.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from tierkv.engine.tokenizer import Tokenizer

COMPILE_S = 20.0
"""How long a request waits for its grammar."""

_MAX_KNOWN = 64  # grammars that are kept, compiled
_MAX_LEXER_STATES = 50_000  # one or two kilobytes each
_SLOWEST_MASK_S = 0.05  # of computing, for one token of one sequence
_MAX_MESSAGE = 300
_GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


class Grammar:
    """A compiled grammar.

    Attributes:
        eos_token_ids: the tokens that end an output, allowed where it is complete.
        num_words: 32-bit words of a mask.
    """

    def __init__(self, prototype: LLMatcher, vocabulary: LLTokenizer) -> None:
        self._prototype = prototype
        self.eos_token_ids = frozenset(vocabulary.eos_tokens)
        self.num_words = num_words(vocabulary)

    def start(self) -> LLMatcher:
        """A matcher at the beginning of an output."""
        return self._prototype.deep_copy()


class GrammarCompiler:
    """Compiles the grammars of requests, and keeps the latest ones.

    Args:
        make_vocabulary: the model's tokens as llguidance wants them; called once. May raise
            RequestError: then no grammar compiles.
    """

    def __init__(self, make_vocabulary: Callable[[], LLTokenizer]) -> None:
        self._make_vocabulary = make_vocabulary
        self._vocabulary_lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._known: OrderedDict[tuple[str, str], Future[Grammar]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def preload(self) -> None:
        """Make the vocabulary now: for a large one that takes a second in which nothing else
        runs."""
        try:
            self._get_vocabulary()
        except RequestError:
            return  # of interest to those who need it

    def begin(self, wanted: StructuredOutputsParams) -> Future[Grammar]:
        """Compile in the background, unless that was done before."""
        spec = wanted.spec()
        if spec not in self._known:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(2, thread_name_prefix="tierkv-grammar")
            self._known[spec] = self._pool.submit(self._compile, *spec)
        self._known.move_to_end(spec)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return self._known[spec]

    def compile(self, wanted: StructuredOutputsParams) -> Grammar:
        """The grammar, once it is compiled.

        Raises:
            RequestError: it is wrong or too complex, or the model has no suitable tokenizer.
        """
        try:
            return self.begin(wanted).result(COMPILE_S)
        except TimeoutError:
            raise too_slow(wanted) from None

    def close(self) -> None:
        """Compile no more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _get_vocabulary(self) -> LLTokenizer:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            return self._vocabulary

    def _compile(self, name: str, text: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        vocabulary = self._get_vocabulary()
        field, limits = f"{FIELD}.{name}", LLParserLimits(max_lexer_states=_MAX_LEXER_STATES)
        try:
            matcher = LLMatcher(vocabulary, _source(name, text), log_level=0, limits=limits)
        except Exception as error:  # converting GBNF raises bare exceptions
            raise RequestError(field, text, _one_line(str(error))) from None
        if not matcher.is_error():
            _try_first_mask(matcher, vocabulary, field, text)
        if matcher.is_error():
            raise RequestError(field, text, _one_line(matcher.get_error()))
        return Grammar(matcher, vocabulary)


def num_words(vocabulary: LLTokenizer) -> int:
    """32-bit words of a mask over the vocabulary."""
    return (vocabulary.vocab_size + 31) // 32


def too_slow(wanted: StructuredOutputsParams) -> RequestError:
    """The error for a grammar that was not compiled in time."""
    name, text = wanted.spec()
    fix = f"takes more than {COMPILE_S:g} s to compile: make it simpler"
    return RequestError(f"{FIELD}.{name}", text, fix)


def make_vocabulary(
    tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: list[int]
) -> LLTokenizer:
    """The tokens of a model, as llguidance wants them.

    Args:
        tokenizer: the model's.
        vocab_size: columns of its logits.
        eos_token_ids: what ends an output; the tokenizer's own when there are none.

    Raises:
        RequestError: there is no tokenizer, or it is one that cannot be read.
    """
    from llguidance import LLTokenizer

    if tokenizer is None:
        raise RequestError(FIELD, "given", "the model has no tokenizer, so it cannot be served")
    if tokenizer.backend is None:
        fix = f"needs a fast tokenizer; this model's is {type(tokenizer.hf).__name__}"
        raise RequestError(FIELD, "given", fix)
    if not eos_token_ids:
        own = tokenizer.hf.eos_token_id
        if own is None:
            raise RequestError(FIELD, "given", "the model has no token that ends an output")
        eos_token_ids = [own]
    size = max(vocab_size, tokenizer.backend.get_vocab_size(with_added_tokens=True))
    try:
        return LLTokenizer(tokenizer.backend.to_str(), n_vocab=size, eos_token=eos_token_ids)
    except Exception as error:  # each kind of tokenizer fails in its own way
        fix = f"cannot be served with this model's tokenizer: {_one_line(str(error))}"
        raise RequestError(FIELD, "given", fix) from None


def _source(name: str, text: str) -> str:
    """The grammar as llguidance's matchers take it."""
    from llguidance import LLMatcher, regex_to_lark
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if name == "regex":
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'd')}/")
    if name == "choice":
        texts = (json.dumps(choice) for choice in json.loads(text))
        return LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
    if name == "grammar":
        is_gbnf = _GBNF_RULE.search(text) is not None
        return LLMatcher.grammar_from_lark(gbnf_to_lark(text) if is_gbnf else text)
    schema = {"type": "object"} if name == "json_object" else json.loads(text)
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})


def _try_first_mask(matcher: LLMatcher, vocabulary: LLTokenizer, field: str, text: str) -> None:
    """What the first token costs; copies of the matcher have what was computed for it."""
    mask = np.zeros(num_words(vocabulary), np.int32)
    start = time.thread_time()
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    seconds = time.thread_time() - start
    if seconds > _SLOWEST_MASK_S:
        fix = f"is too complex: it takes {seconds * 1000:.0f} ms to find out what one token may be"
        raise RequestError(field, text, fix)
    if not mask.any() and not matcher.is_error():
        raise RequestError(field, text, "allows nothing that the model's tokens can spell")


def _one_line(message: str) -> str:
    return " ".join(message.split())[:_MAX_MESSAGE]
