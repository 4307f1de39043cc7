"""Sessions to files and back, in front of the engine: one block at a time, in bounded memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any, BinaryIO

from tierkv.cache.hashing import TOKEN_BYTES, block_key, root_key
from tierkv.engine.async_llm import AsyncLLM
from tierkv.engine.core import EngineInfo
from tierkv.engine.kv_hints import check_session
from tierkv.errors import ConflictError, RequestError
from tierkv.server.replies import Json
from tierkv.storage.session_file import (
    SessionBlock,
    SessionHeader,
    SessionReader,
    SessionWriter,
    most_file_bytes,
)

_PATIENCE_S = 30.0  # with a block that cannot be read or has no room
_PAUSE_S = 0.005
_MOST_SHOWN = 64  # characters of what a file says


def header_of(info: EngineInfo, salt: str, session_id: str) -> SessionHeader:
    """What a file of this server begins with."""
    fingerprint = info.fingerprint.hex()
    return SessionHeader(
        fingerprint, info.layout, info.block_size, info.block_bytes, salt, session_id
    )


async def export(engine: AsyncLLM, tenant: str, session_id: str) -> AsyncGenerator[bytes, None]:
    """The file of a session, piece by piece; the first comes once a block could be read.

    Where a block has gone since, the file ends before it: what came before is whole.

    Raises:
        NotFoundError: there is no such session, or nothing of it is cached.
        ConflictError: a tier does not answer.
    """
    salt, keys = await engine.kv("session_keys", tenant, session_id)
    writer = SessionWriter()
    pieces = [writer.header(header_of(engine.info, salt, session_id))]
    for key in keys:
        answer = await _patiently(engine, "export_block", key)
        if answer is None:
            break
        pieces.append(writer.block(SessionBlock(key, *answer)))
        yield b"".join(pieces)
        pieces = []
    yield b"".join([*pieces, writer.end()])


async def _patiently(engine: AsyncLLM, name: str, *arguments: Any) -> Any:
    """The call's answer once it is neither empty nor "busy"."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        answer = await engine.kv(name, *arguments)
        if answer != [] and answer != "busy":
            return answer
        if time.monotonic() > end:
            fix = f"no progress in {_PATIENCE_S:g} s: a tier does not answer, or has no room"
            raise ConflictError("file", "<session>", fix)
        await asyncio.sleep(_PAUSE_S)


def most_bytes(info: EngineInfo) -> int:
    """Of a file with the longest session that this server could have made."""
    return most_file_bytes(info.block_size, info.block_bytes, info.max_model_len)


def check(file: BinaryIO, info: EngineInfo) -> SessionHeader:
    """Read a file to its end, and see that this server may use all of it.

    Raises:
        RequestError: it is torn, was changed, or its keys are not those of its tokens.
        ConflictError: another model, layout or block size wrote it.
    """
    file.seek(0)
    reader = SessionReader(file)
    header = reader.header
    check_session(header.session_id, "file.session_id")
    ours = header_of(info, header.salt, header.session_id)
    for name in ("model", "layout", "block_size", "block_bytes"):
        theirs, own = getattr(header, name), getattr(ours, name)
        if theirs != own:
            shown = str(theirs)[:_MOST_SHOWN]
            fix = f"is of another {name} ({shown}; this server has {own}); nothing of it was used"
            raise ConflictError("file", "<session>", fix)
    parent = root_key(info.fingerprint, header.salt)
    for block in reader.blocks():
        if block.parent != parent or block_key(parent, block.tokens) != block.key:
            fix = "has a key that is not that of its tokens; nothing of it was used"
            raise RequestError("file", "<session>", fix)
        _check_tokens(block.tokens, info.vocab_size)
        parent = block.key
    return header


def _check_tokens(tokens: bytes, vocab_size: int) -> None:
    for at in range(0, len(tokens), TOKEN_BYTES):
        if int.from_bytes(tokens[at : at + TOKEN_BYTES], "big") >= vocab_size:
            fix = "holds tokens that the model does not have; nothing of it was used"
            raise RequestError("file", "<session>", fix)


async def take_in(engine: AsyncLLM, file: BinaryIO, tenant: str) -> Json:
    """Import a file that was checked; says how much of it is there now.

    Raises:
        ConflictError: there is no room, and none comes.
    """
    header = await asyncio.to_thread(check, file, engine.info)
    file.seek(0)
    blocks = SessionReader(file).blocks()
    keys: list[bytes] = []
    counts = {"taken": 0, "known": 0, "lost": 0}
    while (block := await asyncio.to_thread(next, blocks, None)) is not None:
        answer = await _patiently(engine, "import_block", header.salt, *block)
        counts[answer] += 1
        if answer == "lost":
            break
        keys.append(block.key)
    if header.session_id and keys:
        await engine.kv("note_session", tenant, header.session_id, header.salt, keys)
    return {
        "session_id": header.session_id,
        "tokens": len(keys) * header.block_size,
        "imported_blocks": counts["taken"],
        "known_blocks": counts["known"],
        "is_complete": not counts["lost"],
    }
