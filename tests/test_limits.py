"""The sizes that keep the engine readable in an afternoon."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
# Each part can be read by itself; see docs/decisions/0003, 0004 and 0007.
MAX_CODE_LINES = {
    "deciding": 8_000,  # requests, scheduler, cache, policies: the engine proper
    "front": 2_500,  # text in and out, the engine's process and the way to it
    "sampling": 1_000,
    "watching": 500,
    "model": 1_700,
    "kernels": 2_500,
    "triton": 1_500,
    "tp": 1_000,  # processes that share a model, and what rank 0 makes of their answers
    "cuda": 1_000,  # streams, events and the mover that uses them
    "storage": 2_500,
}
PARTS = {
    "kernels/triton": "triton",
    "tierkv/cache/cuda": "cuda",
    "tierkv/engine/tp": "tp",
    "tierkv/model/shard.py": "tp",
    "tierkv/model": "model",
    "kernels": "kernels",
    "storage": "storage",
}
_FRONT = (
    "async_llm beam beam_runner build calibrate client detokenizer inputs llm output_processor"
    " outputs process tokenizer wire"
)
_SAMPLING = (
    "grammar grammar_masks grammar_params grammar_queue sampler sampler_filters sampler_logprobs"
    " sampler_unread sampling_params"
)
_WATCHING = "cells holders observe tier_metrics timeline"
for _part, _names in (("front", _FRONT), ("sampling", _SAMPLING), ("watching", _WATCHING)):
    PARTS |= {f"tierkv/engine/{name}.py": _part for name in _names.split()}

CODE_FOLDERS = ("tierkv", "kernels", "storage", "policies", "tests", "scripts", "benchmarks")
ENGINE_FOLDERS = ("tierkv", "kernels", "storage", "policies")
OUTSIDE_THE_ENGINE = ("tierkv/sim", "tierkv/server", "tierkv/cli")
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
SOURCE_SUFFIXES = (".py", ".c", ".h", ".cu")


def source_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    """Source files below `folders`, each once: the links inside `tierkv/` are not followed."""
    found = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            linked = any(parent.is_symlink() for parent in path.parents)
            if path.suffix in SOURCE_SUFFIXES and path.is_file() and not linked:
                found.append(path)
    return found


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_files_are_short(repository: Path) -> None:
    files = source_files(repository, CODE_FOLDERS)
    assert len(files) > 20
    too_long = {str(path): n for path in files if (n := num_lines(path)) > MAX_FILE_LINES}
    assert not too_long, f"files over {MAX_FILE_LINES} lines: {too_long}"


def test_functions_are_short(repository: Path) -> None:
    files = [p for p in source_files(repository, CODE_FOLDERS) if p.suffix == ".py"]
    sizes = dict(size for path in files for size in functions(path))
    assert len(sizes) > 100
    too_long = {name: n for name, n in sizes.items() if n > MAX_FUNCTION_LINES}
    assert not too_long, f"functions over {MAX_FUNCTION_LINES} lines: {too_long}"


def num_code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, no comments, no docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        lines = (line.strip() for line in text.splitlines())
        return sum(bool(line) and not line.startswith(("//", "/*", "*")) for line in lines)
    skipped = (*NO_CODE, tokenize.INDENT, tokenize.DEDENT)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def part_of(path: Path, repository: Path) -> str:
    relative = path.relative_to(repository)
    return next((p for d, p in PARTS.items() if relative.is_relative_to(d)), "deciding")


def test_the_engine_is_small(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = tuple(repository / folder for folder in OUTSIDE_THE_ENGINE)
    files = [
        path
        for path in source_files(repository, ENGINE_FOLDERS)
        if not any(path.is_relative_to(folder) for folder in outside)
    ]
    code: Counter[str] = Counter()
    for path in files:
        code[part_of(path, repository)] += num_code_lines(path)
    lengths = [n for path in files if path.suffix == ".py" for _, n in functions(path)]
    with capsys.disabled():
        parts = ", ".join(f"{p} {code[p]:,} of {most:,}" for p, most in MAX_CODE_LINES.items())
        print(
            f"\nlines of code: {parts}; functions: median {statistics.median(lengths):g},"
            f" longest {max(lengths)} lines"
        )
    for part, most in MAX_CODE_LINES.items():
        assert code[part] < most, part
