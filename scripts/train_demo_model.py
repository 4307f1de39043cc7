"""Train tierkv's built-in `demo` model: a 5-million-parameter Llama that recalls and chats.

    python scripts/train_demo_model.py --out tierkv/model/demo --minutes 50

Needs torch, transformers, tokenizers and an hour of CPU time; downloads nothing. It learns from

- the text of the Python installation it runs on: the prose of `help('topics')`, the docstrings and
  the source of the standard library (PSF licence), read with `ast`, never imported;
- generated recall documents (`eval_demo_model.py`): codes are planted, and asked for later;
- generated chats: greetings, facts and stories (`chats.json` beside the model), questions about
  docstrings.

Matrices are trained with Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), the
rest with AdamW. Rows grow from 256 to 2048 tokens, so that copying is learnt where it is easy. Some
long rows get a gap in their position ids (PoSE: Zhu et al. 2023, arXiv:2309.10400), so that
distances beyond 2048 are not wholly new to the model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))  # for PYTHONSAFEPATH=1
import eval_demo_model as recall
from eval_demo_model import BOS, EOS, PAD, Corpus, first_paragraph, split_marks

VOCAB_SIZE = 4096
MAX_POSITIONS = 32768
SPECIAL_TOKENS = [PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = {'developer': 'system', 'tool': 'user'}.get(message['role'], message['role']) %}"
    "{{ '<|' + role + '|>\n' + message['content'] | trim + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Words with their leading space, single digits (a code is copied digit by digit), punctuation runs:
# the pattern of Qwen2's tokenizer (transformers, models/qwen2/tokenization_qwen2.py).
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATS = json.loads(
    (Path(__file__).parents[1] / "tierkv/model/demo/chats.json").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Phase:
    """Until `end` (a share of the run): rows of `length` tokens, `batch_tokens` per step."""

    end: float
    length: int
    batch_tokens: int
    recall_share: float
    gap_share: float = 0.0


PHASES = (
    Phase(0.15, 256, 2048, 0.65),
    Phase(0.45, 512, 4096, 0.50),
    Phase(0.70, 1024, 4096, 0.45),
    Phase(1.00, 2048, 4096, 0.40, gap_share=0.25),
)


# --- chats --------------------------------------------------------------------------------------


def simple_story(rng: random.Random) -> str:
    """Five or six sentences about somebody with an invented name."""
    words = {key: rng.choice(options) for key, options in CHATS["stories"].items()}
    name = recall.invent_name(rng)
    text = (
        "Once upon a time there was {who} {where}, called {name}. {name} {want}. {then} {did} {end}"
    )
    return text.format(**words, name=name).replace("{name}", name)


def chat_turn(corpus: Corpus, rng: random.Random) -> list[tuple[str, str]]:
    """One question and its answer."""
    kind = rng.random()
    if kind < 0.45:
        topic = rng.choice(CHATS["greetings"] if kind < 0.12 else CHATS["facts"])
        return [("user", rng.choice(topic["ask"])), ("assistant", rng.choice(topic["say"]))]
    if kind < 0.55:
        return [("user", rng.choice(CHATS["stories"]["ask"])), ("assistant", simple_story(rng))]
    if kind < 0.62:
        text = rng.choice((rng.choice(corpus.sentences)[:150], simple_story(rng)[:120])).strip()
        return [("user", f"Repeat this: {text}"), ("assistant", text)]
    name, text = rng.choice(corpus.docstrings)
    ask = rng.choice(("What does {} do?", "What does {} do?", "What is {}?", "Explain {}."))
    return [("user", ask.format(name)), ("assistant", first_paragraph(text)[:400])]


def chat(corpus: Corpus, rng: random.Random) -> str:
    messages = [("system", "You are a helpful assistant.")] if rng.random() < 0.3 else []
    for _ in range(rng.choice((1, 1, 2, 3))):
        messages += chat_turn(corpus, rng)
    return recall.render(messages)


# --- documents ----------------------------------------------------------------------------------


def filler_run(corpus: Corpus, rng: random.Random, chars: int) -> str:
    """Consecutive sentences of the corpus, or a generated story, of about `chars` characters."""
    if rng.random() < 0.2:
        text = simple_story(rng)
        while len(text) < chars:
            text += " " + simple_story(rng)
    else:
        index, text = rng.randrange(len(corpus.sentences)), ""
        while len(text) < chars:
            text += " " + corpus.sentences[index % len(corpus.sentences)]
            index += 1
    text = text.strip()
    end = text.find(" ", chars)
    return text[:end] if end > 0 else text


def repetition(rng: random.Random, chars: int) -> str:
    """Invented words and digits, twice: the plainest reason to form induction heads."""
    words = [
        rng.choice((recall.invent_name(rng), str(rng.randrange(10**5)))) for _ in range(chars // 14)
    ]
    text = " ".join(words)
    return f"{BOS}{text}\n{recall.ANSWER_MARK}{text}{recall.END_MARK}{EOS}"


def plain_text(corpus: Corpus, rng: random.Random, chars: int) -> str:
    """A piece of prose, of docstrings, or of source."""
    kind = rng.random()
    if kind < 0.35:
        text = rng.choice(corpus.prose)
    elif kind < 0.75:
        start, text = rng.randrange(len(corpus.docstrings)), ""
        while len(text) < chars and start < len(corpus.docstrings):
            text += "{}\n{}\n\n".format(*corpus.docstrings[start])
            start += 1
    elif kind < 0.85:
        return BOS + simple_story(rng) + EOS
    else:
        text = rng.choice(corpus.source)
    start = text.find("\n", rng.randrange(max(1, len(text) - chars))) + 1
    return BOS + text[start : start + chars] + EOS


# --- rows ---------------------------------------------------------------------------------------


class RowMaker:
    """Rows of token ids and loss weights, each filled with whole documents from its start."""

    def __init__(self, tokenizer: Tokenizer, corpus: Corpus, rng: random.Random) -> None:
        self.tokenizer, self.corpus, self.rng = tokenizer, corpus, rng
        self.filler = partial(filler_run, corpus, rng)

    def encode(self, marked: str) -> tuple[list[int], list[float]]:
        text, spans = split_marks(marked)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        weights = [1.0] * len(encoding.ids)
        for start, end, weight in spans:
            first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
            weights[first : last + 1] = [weight] * (last + 1 - first)
        return list(encoding.ids), weights

    def document_maker(self, phase: Phase) -> Callable[[int], str]:
        """What the next row is filled with: a function of the wanted number of characters."""
        rng, corpus, kind = self.rng, self.corpus, self.rng.random()
        if kind < phase.recall_share:
            if phase.length <= 512 and rng.random() < 0.15:
                return lambda chars: repetition(rng, min(chars, 600))
            maker = rng.choice((recall.plain_recall, recall.chat_recall))
            return lambda chars: maker(self.filler, rng, chars)
        if kind < (1 + phase.recall_share) / 2:
            return lambda chars: chat(corpus, rng)
        return lambda chars: plain_text(corpus, rng, chars)

    def row(self, phase: Phase) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        make = self.document_maker(phase)
        while len(ids) <= phase.length:
            room = phase.length + 1 - len(ids)
            wanted = room if self.rng.random() < 0.6 else self.rng.randint(min(64, room), room)
            more_ids, more_weights = self.encode(make(int(wanted * 3.2)))
            ids += more_ids
            weights += more_weights
        return ids[: phase.length + 1], weights[: phase.length + 1]

    def positions(self, phase: Phase) -> list[int]:
        """0, 1, 2, ... with, in some rows, one gap so large that MAX_POSITIONS is not exceeded."""
        positions = list(range(phase.length))
        if self.rng.random() < phase.gap_share:
            cut = self.rng.randrange(phase.length)
            gap = int(math.exp(self.rng.uniform(4, math.log(MAX_POSITIONS - phase.length))))
            positions[cut:] = [position + gap for position in positions[cut:]]
        return positions


# --- model and training -------------------------------------------------------------------------


def train_tokenizer(corpus: Corpus, rng: random.Random) -> Tokenizer:
    """Byte-level BPE: any text round-trips; a digit is always one token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    filler = partial(filler_run, corpus, rng)
    texts = corpus.prose * 2 + [text for _, text in corpus.docstrings]
    texts += [text[:4000] for text in corpus.source]
    for maker in (recall.plain_recall, recall.chat_recall):
        texts += [split_marks(maker(filler, rng, 3000))[0] for _ in range(100)]
    texts += [split_marks(chat(corpus, rng))[0] for _ in range(1000)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    plant_induction(model)
    return model


def zero_except(width: int, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A matrix with these rows, and zeros elsewhere."""
    matrix = torch.zeros(width, values.shape[-1])
    matrix[rows] = values
    return matrix


@torch.no_grad()
def plant_induction(model: LlamaForCausalLM, width: int = 32) -> None:
    """Start from an induction circuit instead of waiting for one (Olsson et al. 2022, 2209.11895).

    Two layers have to find each other before a model copies; by chance that takes longer than this
    run. So the first weights are not all random. Four heads of layer 0 attend 1, 2, 3 and 4 tokens
    back, and write what they find (`width` directions of the embedding) to four subspaces. Heads of
    layer 1 look for a place whose previous tokens (1-2 back, or 3-4 back) equal the present ones,
    and pass its token on. Training is free to change all of it.
    """
    config, embedding = model.config, model.model.embed_tokens.weight
    size, head, half = config.hidden_size, config.head_dim, config.head_dim // 2
    basis = torch.zeros(size, size - 1)
    basis[1:] = torch.linalg.qr(torch.randn(size - 1, size - 1))[0]
    content, *back = (basis[:, width * i : width * (i + 1)] for i in range(5))
    embedding += 2 * (embedding @ content) @ content.T
    for slot in back:
        embedding -= (embedding @ slot) @ slot.T
    embedding[:, 0] = 0.16  # the same for all tokens: what attention by position starts from

    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)[:10]
    ones, fast = torch.ones(10), torch.arange(10)
    slow = [torch.arange(half // 2, half), torch.arange(half + half // 2, head)]
    unit = torch.zeros(1, size)
    unit[0, 0] = 1.0
    for h in range(4):
        # A query turned back by `h + 1` positions scores highest `h + 1` tokens back.
        angle = frequencies * (h + 1)
        turned = torch.cat([torch.cos(angle), -torch.sin(angle)])[:, None] * unit
        rows = slice(h * head, (h + 1) * head)
        first.q_proj.weight[rows] = zero_except(head, torch.cat([fast, fast + half]), turned)
        first.o_proj.weight[:, rows] = 0.0
        first.o_proj.weight[:, h * head : h * head + width] = 0.1 * back[h]
        second.o_proj.weight[:, rows] *= 0.2
        second.o_proj.weight[:, h * head : h * head + width] = 0.5 * content
    sources = [content, *back]
    for kv in range(2):
        rows = slice(kv * head, (kv + 1) * head)
        first.k_proj.weight[rows] = zero_except(head, fast, ones[:, None] * unit)
        first.v_proj.weight[rows] = zero_except(head, torch.arange(width), content.T)
        second.v_proj.weight[kv * head : kv * head + width] = content.T
        for side in (0, 1):
            offset = 1 + 2 * kv + side
            second.k_proj.weight[kv * head + slow[side]] = 2 * sources[offset][:, : half // 2].T
            query = 2 * sources[offset - 1][:, : half // 2].T
            for h in (2 * kv, 2 * kv + 1):
                second.q_proj.weight[h * head + slow[side]] = query


class Trainer:
    """The model, its optimisers, and how far they have come; all of it can be saved and resumed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.corpus = recall.read_corpus()
        self.rng = random.Random(args.seed)
        torch.manual_seed(args.seed)
        self.tokenizer = train_tokenizer(self.corpus, self.rng)
        self.rows = RowMaker(self.tokenizer, self.corpus, self.rng)
        self.model = build_model(self.tokenizer)
        named = dict(self.model.named_parameters())
        matrices = [p for name, p in named.items() if p.ndim == 2 and "layers" in name]
        others = [p for name, p in named.items() if p.ndim != 2 or "layers" not in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.02, momentum=0.95),
            torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.points: list[dict[str, Any]] = []

    def progress(self) -> float:
        """0 at the start, 1 when the time or the tokens are used up."""
        return max(self.seconds / 60 / self.args.minutes, self.tokens / self.args.tokens)

    def set_rates(self) -> None:
        """Warm up for 2 %, hold, then fall to 0 in the second half of the run."""
        progress = self.progress()
        scale = min(1.0, progress / 0.02 + 0.02, (1 - progress) / 0.5)
        for optimizer, rate in zip(self.optimizers, self.peak_rates(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * max(scale, 0.0)

    def peak_rates(self) -> tuple[float, float]:
        return self.args.muon_lr, self.args.adam_lr

    def accumulate(self, phase: Phase, rows: int) -> tuple[float, float]:
        """Add the gradient of some rows; returns their (sum of loss, tokens), unweighted."""
        made = [self.rows.row(phase) for _ in range(rows)]
        ids = torch.tensor([row for row, _ in made])
        weights = torch.tensor([weights for _, weights in made])[:, 1:].reshape(-1)
        positions = torch.tensor([self.rows.positions(phase) for _ in range(rows)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.model.model(ids[:, :-1], position_ids=positions, use_cache=False)[0]
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1)
        total, plain = torch.zeros(()), 0.0
        # In pieces, so that the logits stay in the CPU's caches.
        for h, t, w in zip(hidden.split(512), targets.split(512), weights.split(512), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = self.model.lm_head(h)
            losses = F.cross_entropy(logits.float(), t, reduction="none")
            total = total + (losses * w).sum()
            plain += float(losses.detach().sum())
        (total / weights.sum() * rows * phase.length / phase.batch_tokens).backward()
        return plain, float(targets.numel())

    def train_step(self) -> float:
        started = time.monotonic()
        phase = next(phase for phase in PHASES if self.progress() < phase.end)
        rows_at_once = max(1, phase.batch_tokens // phase.length)
        loss = count = 0.0
        while count < phase.batch_tokens:
            more_loss, more_count = self.accumulate(phase, rows_at_once)
            loss, count = loss + more_loss, count + more_count
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.set_rates()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step, self.tokens = self.step + 1, self.tokens + int(count)
        self.seconds += time.monotonic() - started
        return loss / count

    def measure(self, loss: float) -> None:
        """Log one point: the mean loss since the last one, and a quick look at the recall."""
        self.model.eval()
        table = recall.recall_accuracy(
            self.model, wrap_tokenizer(self.tokenizer), self.corpus.sentences, 10, (64, 512)
        )
        self.model.train()
        point = {"step": self.step, "tokens": self.tokens, "minutes": round(self.seconds / 60, 1)}
        self.points.append({**point, "loss": round(loss, 3), "recall": table})
        print(json.dumps(self.points[-1]), flush=True)

    def run(self) -> None:
        losses: list[float] = []
        next_save = next_measure = 0.0
        while self.progress() < 1:
            losses.append(self.train_step())
            if self.step % 20 == 0:
                print(f"{self.step} {self.tokens} {self.seconds:.0f}s {losses[-1]:.3f}", flush=True)
            if self.progress() >= next_measure or self.progress() >= 1:
                self.measure(sum(losses) / len(losses))
                losses, next_measure = [], self.progress() + 1 / self.args.points
            if self.seconds >= next_save:
                self.save()
                next_save = self.seconds + 300

    def save(self) -> None:
        state = {key: getattr(self, key) for key in ("step", "tokens", "seconds", "points")}
        state |= {"model": self.model.state_dict(), "rng": self.rng.getstate()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, self.args.checkpoint)

    def resume(self) -> None:
        state = torch.load(self.args.checkpoint, weights_only=True)
        self.model.load_state_dict(state.pop("model"))
        self.rng.setstate(state.pop("rng"))
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        vars(self).update(state)


def export(trainer: Trainer, out: Path) -> None:
    """Write what AutoTokenizer and AutoModelForCausalLM load, and the log of the run."""
    model = trainer.model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    model.config.use_cache = True
    model.save_pretrained(out)
    wrap_tokenizer(trainer.tokenizer).save_pretrained(out)
    log = {
        "command": f"{trainer.args.minutes:g} minutes, seed {trainer.args.seed}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
        "tokens": trainer.tokens,
        "steps": trainer.step,
        "minutes": round(trainer.seconds / 60, 1),
        "points": trainer.points,
    }
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=50.0, help="training time")
    parser.add_argument("--tokens", type=float, default=1e9, help="stop after so many tokens")
    parser.add_argument("--points", type=int, default=20, help="measurements in the log")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--checkpoint", type=Path, default=Path("demo_checkpoint.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    args = parser.parse_args()
    trainer = Trainer(args)
    if args.resume:
        trainer.resume()
    trainer.run()
    trainer.save()
    args.out.mkdir(parents=True, exist_ok=True)
    export(trainer, args.out)


if __name__ == "__main__":
    main()
