"""A tiny random Llama with a byte-level tokenizer and a chat template, for front-end tests."""

from __future__ import annotations

from pathlib import Path

from tiny_models import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 300
EOS = "<|end|>"
EOS_ID = 0
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens; id 0 is the end-of-sequence token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS],
        show_progress=False,
    )
    corpus = ["the code of the fox is seven, and the fox sleeps in the house"] * 3
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, chat_template=CHAT_TEMPLATE
    )


def save_text_model(directory: Path, seed: int = 0) -> Path:
    """Write the model and its tokenizer as a Hugging Face directory and return it."""
    save_model("llama", directory, seed, vocab_size=VOCAB_SIZE, eos_token_id=EOS_ID)
    byte_tokenizer().save_pretrained(directory)
    return directory
