"""What a Hugging Face config says about limits, ends and support, before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tierkv.cache.layout import KVLayout
from tierkv.errors import ConfigError, UnsupportedModelError

_UNBOUNDED = 1 << 20
_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model."""
    return config.get_text_config(decoder=True)


def rope_parameters(config: Any) -> dict[str, Any]:
    """The rotary embedding's parameters, flat; {} without scaling or rotary embedding.

    Where kinds of layers have their own, those of full attention.
    """
    text = text_config(config)
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if "rope_type" not in found and isinstance(found.get("full_attention"), dict):
        found = found["full_attention"]
    return dict(found)


def rope_kind(config: Any) -> str:
    """`default`, `linear`, `yarn`, `llama3`, `longrope`, ..."""
    rope = rope_parameters(config)
    return str(rope.get("rope_type", rope.get("type", "default")))


def max_positions(config: Any) -> int:
    """The longest context the config was made for, rope scaling included.

    Scaling that depends on the length of the longest sequence in a batch (`dynamic`, `longrope`)
    does not count: beyond the original length the rotation of *every* token would change with its
    neighbours, and no cached key could be reused.
    """
    text = text_config(config)
    lengths: list[Any] = [getattr(text, name, None) for name in _LENGTH_FIELDS]
    known = [value for value in lengths if isinstance(value, int) and value > 0]
    if not known:
        return _UNBOUNDED
    length: int = known[0]
    rope = rope_parameters(config)
    kind = rope_kind(config)
    original = rope.get("original_max_position_embeddings")
    if original is None:
        original = getattr(text, "original_max_position_embeddings", None)
    if kind in _LENGTH_DEPENDENT:
        return int(original or length)
    factor = float(rope.get("factor", 1.0))
    if kind == "linear":
        return int(length * factor)
    if kind == "yarn" and original:
        return max(length, int(original * factor))
    return length


def eos_token_ids(
    config: Any, directory: Path | None, generation_config: Any = None
) -> frozenset[int]:
    """Tokens that end a text, from the first of these that says so.

    Args:
        config: the model's config, asked last.
        directory: where `generation_config.json` may lie, asked first.
        generation_config: what transformers loaded beside the weights (a hub model's).

    Raises:
        ConfigError: they are no token ids.
    """
    found: Any = None
    if directory is not None and (directory / "generation_config.json").is_file():
        found = _read_object(directory / "generation_config.json").get("eos_token_id")
    for source in (generation_config, text_config(config), config):
        if found is None:
            found = getattr(source, "eos_token_id", None)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token_id, int) for token_id in ids):
        fix = "must be token ids: correct the model's generation_config.json or config.json"
        raise ConfigError("eos_token_id", found, fix)
    return frozenset(ids)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("model", str(path), f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError("model", str(path), "must hold a JSON object")
    return values


def check_config(config: Any) -> None:
    """Refuse what a paged KV cache cannot serve, from the config alone.

    Raises:
        UnsupportedModelError: with the reason.
    """
    text = text_config(config)
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(config, "encoder-decoder models are not supported, only causal ones")
    for kind in getattr(text, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise _refusal(config, f"layers of kind {kind!r} keep no paged KV")
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise _refusal(config, "it attends in both directions")
    if getattr(text, "attn_temperature_tuning", False) and 0 in (
        getattr(text, "no_rope_layers", None) or ()
    ):
        raise _refusal(config, "it scales attention by a token's place in the forward pass")
    if getattr(text, "alibi", False):
        raise _refusal(config, "ALiBi position bias is not supported")
    KVLayout.from_config(text, block_size=1, dtype="float32")
    _check_latent(text)


def _check_latent(text: Any) -> None:
    """Multi-head latent attention has keys wider than its values; one pool wants them equal."""
    if getattr(text, "kv_lora_rank", None) is None:
        return
    key_dim = getattr(text, "qk_nope_head_dim", 0) + getattr(text, "qk_rope_head_dim", 0)
    if key_dim != getattr(text, "v_head_dim", key_dim):
        raise _refusal(text, f"its keys have {key_dim} elements per head, its values differ (MLA)")


def check_class(config: Any, model_class: type[Any] | None) -> None:
    """Refuse model code that the attention function cannot get into.

    Args:
        config: for the message.
        model_class: what transformers would build; None when it knows no causal model for it.

    Raises:
        UnsupportedModelError: with the reason.
    """
    if model_class is None:
        raise _refusal(config, "transformers has no causal language model of this type")
    if getattr(model_class, "_is_stateful", False):
        raise _refusal(config, "it keeps recurrent state beside or instead of a KV cache")
    if not model_class._can_set_attn_implementation():
        raise _refusal(config, "its attention layers bypass transformers' AttentionInterface")


def _refusal(config: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError("model", getattr(config, "model_type", "?"), reason)
