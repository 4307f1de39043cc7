"""A tiny random model with a byte-level tokenizer and a chat template: all that a server needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
from tiny_models import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ opening | default('') }}{% endif %}"
)
LOADING_S = 300


def save_tokenizer(directory: Path) -> None:
    """One token per byte, plus the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, *SPECIAL])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL[1:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


def save_servable(directory: Path) -> Path:
    """Write the model and its tokenizer into `directory`; returns it."""
    size = 256 + len(SPECIAL)
    save_model("llama", directory, vocab_size=size, eos_token_id=256)
    save_tokenizer(directory)
    return directory


class ServerProcess:
    """A running `tierkv serve`, as a user would start it."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-P", "-m", "tierkv", "serve", "--port", "0", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.log: list[str] = []
        self.url = ""
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            match = re.search(r"ready at (http://\S+)", line)
            if match:
                self.url = match.group(1)
                self._is_ready.set()
        self._is_ready.set()

    def wait_until_ready(self) -> None:
        """Return when the server answers; fail with its log when it does not come up."""
        assert self._is_ready.wait(LOADING_S), "".join(self.log)
        assert self.url, f"the server ended: {''.join(self.log)}"

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """OpenAI's own client, without retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=300)

    def wait(self, timeout_s: float = 120) -> int:
        """The exit status, once it ends."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running_server(*arguments: str) -> Iterator[ServerProcess]:
    """A server that is ready; it is gone afterwards."""
    server = ServerProcess(*arguments)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()
