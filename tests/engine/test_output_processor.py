"""Engine outputs to texts: stop strings, deltas, samples, aborts, log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import EOS_ID, byte_tokenizer

from tierkv.engine.core import EngineRequest
from tierkv.engine.output_processor import OutputProcessor, RequestState, StopCommand
from tierkv.engine.outputs import RequestMetrics, SequenceOutput
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.tokenizer import Tokenizer
from tierkv.errors import RequestError
from tierkv.types import FinishReason, Logprob

TOKENIZER = Tokenizer(byte_tokenizer())


def started(**params: Any) -> tuple[OutputProcessor, RequestState]:
    processor = OutputProcessor(TOKENIZER)
    request = EngineRequest("r", TOKENIZER.encode("say: "), SamplingParams(**params))
    return processor, processor.add(request, "say: ")


def news(tokens: list[int], index: int = 0, **fields: Any) -> SequenceOutput:
    return SequenceOutput("r", 10 + index, index, tokens, **fields)


def feed(processor: OutputProcessor, text: str, index: int = 0) -> list[StopCommand]:
    """One output per token, until a stop command comes."""
    for token in TOKENIZER.encode(text):
        _, stops = processor.process([news([token], index)])
        if stops:
            return stops
    return []


def test_text_grows_and_ends_with_the_length() -> None:
    processor, state = started()
    assert feed(processor, "the fox") == []
    assert (state.output().outputs[0].text, state.is_finished) == ("the fox", False)
    metrics = RequestMetrics(1.0, 2.0, 3.0, 4.0)
    last = news(
        TOKENIZER.encode("!"),
        finish_reason=FinishReason.LENGTH,
        num_cached_tokens=2,
        metrics=metrics,
    )
    assert processor.process([last]) == ([state], [])
    output = state.output()
    (completion,) = output.outputs
    assert (completion.text, completion.finish_reason) == ("the fox!", "length")
    assert completion.token_ids == TOKENIZER.encode("the fox") + TOKENIZER.encode("!")
    assert (output.prompt, output.num_cached_tokens) == ("say: ", 2)
    assert output.finished and output.metrics == metrics
    assert len(processor) == 0


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens(include: bool) -> None:
    processor, state = started(stop=["x s"], include_stop_str_in_output=include)
    assert feed(processor, "the fox sleeps") == [StopCommand("r", 0)]
    (completion,) = state.output().outputs
    assert completion.text == ("the fox s" if include else "the fo")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "x s")
    assert TOKENIZER.decode(completion.token_ids).startswith("the fox s")


def test_what_comes_after_a_stop_string_is_ignored() -> None:
    """The rest of the same output, and outputs sent before the engine heard of it."""
    processor, state = started(n=2, stop="!")
    tokens = TOKENIZER.encode("a!b")
    late = news(TOKENIZER.encode("c"), finish_reason=FinishReason.LENGTH)
    assert processor.process([news(tokens)])[1] == [StopCommand("r", 0)]
    assert processor.process([late]) == ([state], [])
    (first, second) = state.output().outputs
    assert (first.text, first.token_ids, first.finish_reason) == ("a", tokens[:2], "stop")
    assert (second.text, second.finish_reason) == ("", None)
    assert not state.is_finished
    feed(processor, "b!", index=1)
    assert state.is_finished and len(processor) == 0


def test_no_command_when_the_engine_ended_with_the_same_token() -> None:
    processor, state = started(stop="!")
    last = news(TOKENIZER.encode("a!"), finish_reason=FinishReason.LENGTH)
    assert processor.process([last]) == ([state], [])
    assert state.output().outputs[0].stop_reason == "!"


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_token_is_text_only_when_asked_for(include: bool) -> None:
    processor, state = started(
        stop_token_ids=TOKENIZER.encode("!"), include_stop_str_in_output=include
    )
    (token,) = TOKENIZER.encode("!")
    processor.process([news(TOKENIZER.encode("the fox"))])
    processor.process([news([token], finish_reason=FinishReason.STOP, stop_reason=token)])
    (completion,) = state.output().outputs
    assert completion.text == ("the fox!" if include else "the fox")
    assert (completion.stop_reason, completion.token_ids[-1]) == (token, token)


@pytest.mark.parametrize("skip", [False, True])
def test_special_tokens_in_the_text(skip: bool) -> None:
    processor, state = started(skip_special_tokens=skip, ignore_eos=True)
    processor.process([news([EOS_ID, *TOKENIZER.encode("a")])])
    assert state.output().outputs[0].text == ("a" if skip else "<|end|>a")


def test_min_tokens_delays_stop_strings() -> None:
    processor, state = started(stop="a", min_tokens=3)
    a, b = (TOKENIZER.encode(c)[0] for c in "ab")
    for token in (a, b):
        assert processor.process([news([token])])[1] == []
    assert processor.process([news([a])])[1] == [StopCommand("r", 0)]
    assert state.output().outputs[0].text == "ab"


def test_an_abort_ends_every_sample_and_shows_held_text() -> None:
    """Samples that were not forked yet never get an output of their own."""
    processor, state = started(n=3, stop="END")
    processor.process([news(TOKENIZER.encode("the EN"))])
    assert state.output().outputs[0].text == "the "
    processor.process([news([], finish_reason=FinishReason.ABORT)])
    outputs = state.output().outputs
    assert [o.finish_reason for o in outputs] == ["abort"] * 3
    assert [o.text for o in outputs] == ["the EN", "", ""]
    assert state.is_finished and len(processor) == 0


def test_logprobs_carry_texts_and_a_sum() -> None:
    processor, state = started(logprobs=1, prompt_logprobs=0)
    the, fox = TOKENIZER.encode("the")[0], TOKENIZER.encode(" fox")[0]
    first = {the: Logprob(-0.5, 1), fox: Logprob(-1.5, 2)}
    processor.process([news([], prompt_logprobs=[{fox: Logprob(-2.0, 7)}])])
    processor.process([news([fox], logprobs=[first])])
    processor.process([news([the], logprobs=[first], prompt_logprobs=[{the: Logprob(-1.0, 1)}])])
    output = state.output()
    (completion,) = output.outputs
    assert completion.cumulative_logprob == -2.0
    assert completion.logprobs is not None and len(completion.logprobs) == 2
    texts = {t: lp.decoded_token for t, lp in completion.logprobs[0].items()}
    assert texts == {t: TOKENIZER.decode([t]) for t in (the, fox)}
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None  # nothing predicts the first token
    assert [list(entry) for entry in output.prompt_logprobs[1:] if entry] == [[fox], [the]]


def test_outputs_are_snapshots() -> None:
    processor, state = started(logprobs=0)
    feed_one = news([5], logprobs=[{5: Logprob(-1.0, 1)}])
    processor.process([feed_one])
    before = state.output()
    processor.process([feed_one])
    assert before.outputs[0].token_ids == [5] and len(before.outputs[0].logprobs or []) == 1


def test_without_a_tokenizer_there_is_no_text() -> None:
    processor = OutputProcessor(None)
    state = processor.add(EngineRequest("r", [1], SamplingParams(logprobs=0)), None)
    processor.process([news([7], logprobs=[{7: Logprob(-1.0, 1)}])])
    (completion,) = state.output().outputs
    assert (completion.text, completion.token_ids) == ("", [7])
    with pytest.raises(RequestError, match="no tokenizer: use stop_token_ids"):
        processor.add(EngineRequest("s", [1], SamplingParams(stop="x")), None)


def test_ids_in_use_and_unknown_ids() -> None:
    processor, _ = started()
    with pytest.raises(RequestError, match="in use"):
        processor.add(EngineRequest("r", [1], SamplingParams()), None)
    processor.forget("r")
    assert processor.process([news([1])]) == ([], [])
    processor.forget("never seen")


def test_outputs_may_show_another_id() -> None:
    processor = OutputProcessor(TOKENIZER)
    request = EngineRequest("r", [1], SamplingParams())
    state = processor.add(request, None, shown_id="user's")
    assert state.output().request_id == "user's"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.text(alphabet="ab🙂 .é", max_size=4), st.booleans()),
        max_size=15,
    )
)
def test_deltas_add_up_to_the_whole(steps: list[tuple[int, str, bool]]) -> None:
    """Two samples, stop string "..", taken at random moments: the concatenation is the output."""
    processor, state = started(n=2, stop="..")
    texts, tokens, ends = ["", ""], [[], []], [0, 0]
    steps = [*steps, (0, "", True)]
    for at, (index, text, is_taken) in enumerate(steps):
        reason = FinishReason.LENGTH if at == len(steps) - 1 else None
        processor.process([news(TOKENIZER.encode(text), index, finish_reason=reason)])
        if is_taken:
            for part in state.take_delta().outputs:
                texts[part.index] += part.text
                tokens[part.index] += part.token_ids
                ends[part.index] += part.finished
    outputs = state.output().outputs
    assert [o.text for o in outputs] == texts
    assert [o.token_ids for o in outputs] == tokens
    assert [o.finished for o in outputs] == [count == 1 for count in ends]
    assert state.take_delta().outputs == []
