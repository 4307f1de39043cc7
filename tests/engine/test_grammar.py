"""Structured output: what grammars allow, and that the engine's ways do not disturb them."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from text_models import byte_tokenizer

from tierkv import LLM, AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams
from tierkv.engine.grammar import GrammarCompiler, make_vocabulary
from tierkv.engine.grammar_params import MAX_CHARACTERS, StructuredOutputsParams
from tierkv.engine.tokenizer import Tokenizer
from tierkv.errors import RequestError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
OPTIONS: dict[str, Any] = {"num_threads": 1, "block_size": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def llm(text_model: Path) -> Iterator[LLM]:
    with LLM(str(text_model), num_gpu_blocks=400, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    tokenizer = Tokenizer(byte_tokenizer())
    found = GrammarCompiler(lambda: make_vocabulary(tokenizer, 300, [0]))
    yield found
    found.close()


def outputs(engine: LLM, prompts: list[Any], wanted: Any, **params: Any) -> list[RequestOutput]:
    values: dict[str, Any] = {"max_tokens": 200, "structured_outputs": wanted, **params}
    return engine.generate(prompts, SamplingParams(**values), use_tqdm=False)


def texts(found: list[RequestOutput]) -> list[str]:
    """Of all samples, each of which its grammar has ended."""
    samples = [sample for output in found for sample in output.outputs]
    assert {sample.finish_reason for sample in samples} == {"stop"}
    return [sample.text for sample in samples]


# -- what is allowed -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_follows_its_schema(llm: LLM, temperature: float) -> None:
    found = outputs(llm, ["hello", "you"], {"json": SCHEMA}, temperature=temperature, n=4)
    for text in texts(found):
        jsonschema.validate(json.loads(text), SCHEMA)
    assert texts(outputs(llm, ["x"], {"json": json.dumps(SCHEMA)}))[0]


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": r"[a-c]{3}-\d{2}"}, r"[a-c]{3}-[0-9]{2}"),
        ({"regex": r"(yes|no)\.?/"}, r"(yes|no)\.?/"),
        ({"choice": ["one", 'two "2"', "drei\n", "vier 🙂"]}, r'one|two "2"|drei\n|vier 🙂'),
        ({"grammar": 'start: "x" start | "y"'}, r"x*y"),
        ({"grammar": 'root ::= item ("," item)*\nitem ::= [0-9]+ | "n"'}, r"([0-9]+|n)(,(\d+|n))*"),
        ({"json": {"type": "string", "pattern": "^[a-f]{2,4}$"}}, r'"[a-f]{2,4}"'),
    ],
    ids=str,
)
def test_whole_outputs_match(llm: LLM, wanted: dict[str, Any], pattern: str) -> None:
    found = texts(outputs(llm, ["hello"], wanted, n=12, seed=4))
    assert all(re.fullmatch(pattern, text) for text in found), found
    assert len(set(found)) > 1


def test_any_json_object(llm: LLM) -> None:
    allowed = [0, *byte_tokenizer().encode('{}":1')]
    params: dict[str, Any] = {"n": 8, "seed": 1, "allowed_token_ids": allowed}
    (output,) = outputs(llm, ["x"], {"json_object": True}, **params)
    found = [sample.text for sample in output.outputs if sample.finish_reason == "stop"]
    assert found
    assert all(isinstance(json.loads(text), dict) for text in found)


def test_the_end_comes_where_the_grammar_accepts_and_nowhere_else(llm: LLM) -> None:
    """Bias asks for the end at once, and for no end; `min_tokens` and `ignore_eos` too."""
    eager = outputs(llm, ["x"], {"regex": "a{3,}"}, logit_bias={0: 100.0}, temperature=0.0)
    assert texts(eager) == ["aaa"]
    shy = outputs(llm, ["x"], {"regex": "a{3,5}"}, logit_bias={0: -100.0}, temperature=0.0)
    assert texts(shy) == ["aaaaa"]
    late = outputs(llm, ["x"], {"regex": "a{3,}"}, min_tokens=6, logit_bias={0: 100.0})
    assert texts(late) == ["aaaaaa"]
    over = outputs(llm, ["x"], {"choice": ["ab"]}, min_tokens=50, ignore_eos=True)
    assert texts(over) == ["ab"]
    cut = outputs(llm, ["x"], {"regex": "a{9}"}, max_tokens=4)[0].outputs[0]
    assert (cut.text, cut.finish_reason) == ("aaaa", "length")


def test_logprobs_are_of_what_is_allowed(llm: LLM) -> None:
    """As in vLLM: the mask comes first, so the probabilities of what it leaves sum to one."""
    (output,) = outputs(llm, ["x"], {"regex": "[abc]{4}"}, logprobs=20, prompt_logprobs=2)
    *letters, end = output.outputs[0].logprobs or []
    for entry in letters:
        assert len(entry) == 3
        assert sum(math.exp(found.logprob) for found in entry.values()) == pytest.approx(1.0)
    assert [found.logprob for found in end.values()] == [pytest.approx(0.0)]


# -- the engine's ways -----------------------------------------------------------------------------


def test_rows_without_a_grammar_are_what_they_are_alone(llm: LLM) -> None:
    free = SamplingParams(max_tokens=40, seed=3, ignore_eos=True)
    bound = SamplingParams(max_tokens=40, seed=3, structured_outputs={"regex": "[a-z]{30}"})  # type: ignore[arg-type]
    prompts = ["hello", "you", "who"]
    alone = llm.generate(prompts, free, use_tqdm=False)
    mixed = llm.generate([*prompts, "hello"], [free, free, free, bound], use_tqdm=False)
    assert [o.outputs[0].token_ids for o in mixed[:3]] == [o.outputs[0].token_ids for o in alone]
    assert re.fullmatch("[a-z]{30}", mixed[3].outputs[0].text)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preempted_sequences_go_on_where_they_were(llm: LLM, text_model: Path, mode: str) -> None:
    prompts = [[7 + i, 9, 11] for i in range(10)]
    wanted: dict[str, Any] = {"regex": "([a-z]{4}-){6}[0-9]{4}"}
    expected = outputs(llm, prompts, wanted, seed=5, n=2)
    lower = {"offload": "cpu=4MiB"} if mode == "swap" else {}
    with LLM(str(text_model), num_gpu_blocks=40, preemption_mode=mode, **lower, **OPTIONS) as small:
        found = outputs(small, prompts, wanted, seed=5, n=2)
        counted = small.metrics()
        assert counted["preemptions"] > 0
        assert (counted["swaps"] > 0) == (mode == "swap")
    assert texts(found) == texts(expected)
    assert all(re.fullmatch(wanted["regex"], text) for text in texts(found))


def test_samples_follow_the_same_grammar_each_for_itself(llm: LLM) -> None:
    (output,) = outputs(llm, ["x"], {"regex": "(ab|ba)+c"}, n=16, seed=2)
    found = [sample.text for sample in output.outputs]
    assert all(re.fullmatch("(ab|ba)+c", text) for text in found)
    assert len(set(found)) > 2


def test_a_grammar_that_fails_on_the_way_aborts_its_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        """A matcher that is in order until it has read a few tokens."""

        def __init__(self, matcher: Any) -> None:
            self._matcher, self._num_read = matcher, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._matcher, name)

        def consume_tokens(self, tokens: list[int]) -> bool:
            self._num_read += len(tokens)
            return bool(self._matcher.consume_tokens(tokens))

        def is_error(self) -> bool:
            return self._num_read >= 3

        def get_error(self) -> str:
            return "too many states"

    from tierkv.engine.grammar import Grammar

    start = Grammar.start
    monkeypatch.setattr(Grammar, "start", lambda self: Failing(start(self)))
    (output,) = outputs(llm, ["x"], {"regex": "a{20}"})
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].text == "aaa"
    assert "too many states" in caplog.text
    monkeypatch.undo()
    assert texts(outputs(llm, ["x"], {"regex": "a{20}"})) == ["a" * 20]


# -- what is refused -------------------------------------------------------------------------------

BAD: list[tuple[Any, str]] = [
    ({}, "structured_outputs"),
    ({"json": SCHEMA, "regex": "a"}, "structured_outputs"),
    ({"json_object": False}, "structured_outputs"),
    ({"json_object": 1}, "structured_outputs.json_object"),
    ({"xml": "a"}, "structured_outputs.xml"),
    ({"json": "{"}, "structured_outputs.json"),
    ({"json": []}, "structured_outputs.json"),
    ({"json": {"enum": [math.nan]}}, "structured_outputs.json"),
    ({"regex": 5}, "structured_outputs.regex"),
    ({"regex": ""}, "structured_outputs.regex"),
    ({"choice": []}, "structured_outputs.choice"),
    ({"choice": ["a", 1]}, "structured_outputs.choice"),
    ({"grammar": "x" * (MAX_CHARACTERS + 1)}, "structured_outputs.grammar"),
    ("json", "structured_outputs"),
]
UNCOMPILABLE: list[tuple[Any, str, str]] = [
    ({"json": {"type": "objec"}}, "json", "objec"),
    ({"json": {"not": {"type": "string"}}}, "json", "not"),
    ({"json": {"$ref": "#/$defs/x"}}, "json", "does not exist"),
    ({"json": {"minimum": 3, "maximum": 1, "type": "integer"}}, "json", "minimum"),
    ({"regex": "(a"}, "regex", "unclosed group"),
    ({"regex": "a(?=b)"}, "regex", "look-around"),
    ({"grammar": "start: x"}, "grammar", "unknown name"),
    ({"grammar": "root ::= x"}, "grammar", "'x' not found"),
    ({"grammar": "nonsense((("}, "grammar", ""),
    ({"json": {"properties": {f"p{i}": {} for i in range(5000)}}}, "json", "too complex"),
]


@pytest.mark.parametrize(("wanted", "field"), BAD)
def test_bad_values_are_named(wanted: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(structured_outputs=wanted)
    assert caught.value.field == field


@pytest.mark.parametrize(("wanted", "name", "reason"), UNCOMPILABLE)
def test_what_does_not_compile_is_named(
    compiler: GrammarCompiler, wanted: Any, name: str, reason: str
) -> None:
    params = StructuredOutputsParams(**wanted)
    with pytest.raises(RequestError) as caught:
        compiler.compile(params)
    assert caught.value.field == f"structured_outputs.{name}"
    assert reason in caught.value.fix
    assert "\n" not in caught.value.fix


def test_grammars_are_compiled_once(compiler: GrammarCompiler) -> None:
    first = compiler.begin(StructuredOutputsParams(json=SCHEMA))
    again = compiler.begin(StructuredOutputsParams(json=json.dumps(SCHEMA)))
    assert first is again
    for i in range(100):
        compiler.compile(StructuredOutputsParams(regex=f"a{{{i + 1}}}"))
    assert compiler.begin(StructuredOutputsParams(json=SCHEMA)) is not first


def test_models_without_a_suitable_tokenizer_say_so() -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        make_vocabulary(None, 300, [0])
    slow = Tokenizer(byte_tokenizer())
    slow.backend = None
    with pytest.raises(RequestError, match="fast tokenizer"):
        make_vocabulary(slow, 300, [0])
    without_end = byte_tokenizer()
    without_end.eos_token = None
    with pytest.raises(RequestError, match="ends an output"):
        make_vocabulary(Tokenizer(without_end), 300, [])
    known = len(byte_tokenizer())
    for columns in (100, 320):
        found = make_vocabulary(Tokenizer(byte_tokenizer()), columns, [])
        assert found.vocab_size == max(columns, known)


def test_a_refused_grammar_leaves_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError, match="unclosed"):
        llm.generate(
            ["a", "b"],
            [SamplingParams(), SamplingParams(structured_outputs={"regex": "(a"})],  # type: ignore[arg-type]
            use_tqdm=False,
        )
    metrics = llm.metrics()
    assert (metrics["running"], metrics["waiting"], metrics["gpu_blocks_used"]) == (0, 0, 0)


# -- the engine process ----------------------------------------------------------------------------


async def last(engine: AsyncLLM, prompt: str, params: SamplingParams, **more: Any) -> RequestOutput:
    async for output in engine.generate(prompt, params, **more):
        found = output
    return found


def wide(count: int) -> dict[str, Any]:
    """A schema that takes about a second to compile for 3,000 properties."""
    return {"json": {"properties": {f"p{i}": {} for i in range(count)}}}


@pytest.fixture(scope="module")
def served(text_model: Path) -> Iterator[AsyncLLM]:
    engine = AsyncLLM.from_options(str(text_model), num_gpu_blocks=400, max_num_seqs=8, **OPTIONS)
    yield engine
    engine.shutdown()


def test_compiling_holds_up_nobody_else(served: AsyncLLM) -> None:
    async def scenario() -> None:
        slow = SamplingParams(structured_outputs=wide(5000))  # type: ignore[arg-type]
        times = [time.perf_counter()]
        refused = asyncio.create_task(last(served, "x", slow))
        async for _ in served.generate("y", SamplingParams(max_tokens=200, ignore_eos=True)):
            times.append(time.perf_counter())
        quick = SamplingParams(structured_outputs={"choice": ["ab"]})  # type: ignore[arg-type]
        assert (await last(served, "x", quick)).outputs[0].text == "ab"
        assert not refused.done()  # others came first
        with pytest.raises(RequestError, match="too complex"):
            await refused
        longest_gap = max(b - a for a, b in itertools.pairwise(times))
        assert longest_gap < (time.perf_counter() - times[0]) / 2

    asyncio.run(scenario())


@pytest.mark.full  # depends on how busy the machine is
def test_a_request_is_aborted_while_its_grammar_is_compiled(served: AsyncLLM) -> None:
    async def scenario() -> None:
        slow = SamplingParams(structured_outputs=wide(5000))  # type: ignore[arg-type]
        task = asyncio.create_task(last(served, "x", slow, request_id="mine"))
        while not task.done():
            await asyncio.sleep(0.05)
            await served.abort("mine")
        try:
            output = await task
        except RequestError as error:
            assert "too complex" in str(error)
            pytest.skip("the machine is too busy: the grammar was refused before the abort came")
        assert output.outputs[0].finish_reason == "abort"

    asyncio.run(scenario())


def test_beam_searches_in_the_engine_process(llm: LLM, served: AsyncLLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=7)
    expected = llm.beam_search(["hello", "you"], params)
    shown = SamplingParams(n=3, max_tokens=7)
    engine = served

    async def scenario() -> list[RequestOutput]:
        free = SamplingParams(max_tokens=30, ignore_eos=True)
        searches = [last(engine, p, shown, beam_search=params) for p in ("hello", "you")]
        *found, beside = await asyncio.gather(*searches, last(engine, "x", free))
        assert len(beside.outputs[0].token_ids) == 30
        wide_search = BeamSearchParams(beam_width=9, max_tokens=2)
        with pytest.raises(RequestError, match="at most 8"):
            await last(engine, "x", SamplingParams(n=9), beam_search=wide_search)
        endless = BeamSearchParams(beam_width=3, max_tokens=2**31, ignore_eos=True)
        task = asyncio.create_task(last(engine, "x", shown, request_id="mine", beam_search=endless))
        await asyncio.sleep(0.1)
        await engine.abort("mine")
        assert {s.finish_reason for s in (await task).outputs} == {"abort"}
        metrics = await engine.metrics()
        assert (metrics["running"], metrics["gpu_blocks_used"]) == (0, 0)
        return found

    found = asyncio.run(scenario())
    for output, search in zip(found, expected, strict=True):
        assert [s.token_ids for s in output.outputs] == [s.token_ids for s in search.sequences]
        reasons = [s.finish_reason for s in search.sequences]
        assert [s.finish_reason for s in output.outputs] == reasons
        assert output.num_cached_tokens is not None
