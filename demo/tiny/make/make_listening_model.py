"""Teaches the tiny language model to read what a bad ear spells: the second course, after `make_language_model.py`.

    python demo/tiny/make/make_listening_model.py --text FOLDER

goes on from that script's last checkpoint and writes demo/tiny/rwkv6-tiny-listening.pth (bf16); `--generation 7` for
the other model. An adapter that has heard an hour of speech misspells a third of the letters; a language model that has
only copied from clean spelling can't tell what was meant. Most documents here are

    mumbled    h _ _ i w u _ s _ t i r d # he was tired      letters wrong, missing or too many, some words more than
                                                            others; half sure of a second letter where it is in doubt

the rest are those of the first course. Interrupted, it goes on from its own last checkpoint.
"""

import argparse
import json
import random
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from make_language_model import (
    CHECKPOINT,
    END,
    FILLER,
    IGNORED,
    SEPARATOR_ID,
    TINY,
    WRONG,
    Documents,
    copying_errors,
    encode,
    learning_rate,
    new_model,
    new_optimizer,
    random_letters,
    save,
    spelling,
)
from make_language_model import LONGEST as LONGEST_RANDOM
from sentences import read_sentences
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rwkv_speech.lm.language_model import LanguageModel

OWN_CHECKPOINT = "output/tiny/rwkv{generation}-listening.ckpt"
LONGEST, WORDS = 72, range(3, 15)  # of a source
KINDS = {"text": 0.12, "copy": 0.06, "spelling": 0.12, "mumbled": 0.7}
RANDOM_LETTERS = {"copy": 0.15, "spelling": 0.03, "mumbled": 0.03}  # of the sources
MUMBLED = 0.5  # of the letters, at most
CLARITY = (0, 0.4, 0.8, 1.2, 2.6)  # of a word: its share of errors beside that of its sentence
ERRORS = {"s": 42, "d": 40, "i": 18}  # substituted, deleted, inserted: as a small CTC model errs on accented speech
PACE = (0.3, 0.7)
SOFT = 0.7  # of the documents have positions between two letters
SOUNDS = ("aeiouy", "bpvfw", "dt", "gkcqxj", "szcx", "mn", "lrw", "aeiou")  # letters that are taken for each other
ALIKE = {c: sorted({x for sound in SOUNDS if c in sound for x in sound} - {c}) for c in string.ascii_lowercase}


class Position(NamedTuple):
    """A token, and a second one that has a share of up to a half in what is heard."""

    token: int
    second: int = FILLER
    share: float = 0.0


class Document(NamedTuple):
    """Tokens, how many of them at the beginning are heard and needn't be predicted, and what is heard besides."""

    tokens: list[int]
    heard: int
    seconds: list[int]
    shares: list[float]


class MumbledDocuments(Documents):
    """As the documents of the first course, with another mixture and longer sources."""

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, targets, second tokens and their shares, each (size, T)."""
        documents = self.made(step // self.TOGETHER, size)[step % self.TOGETHER]
        tokens = pad_sequence([torch.tensor(d.tokens[:-1]) for d in documents], True)
        targets = [torch.tensor([IGNORED] * d.heard + d.tokens[d.heard + 1 :]) for d in documents]
        seconds, shares = torch.full_like(tokens, FILLER), torch.zeros(tokens.shape)
        for row, document in enumerate(documents):
            if document.seconds:
                seconds[row, : document.heard] = torch.tensor(document.seconds)
                shares[row, : document.heard] = torch.tensor(document.shares)
        return tokens, pad_sequence(targets, True, IGNORED), seconds, shares

    def document(self, rng: random.Random, longest: int) -> Document:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "text":
            at = rng.randrange(len(self.sentences) - 4)
            return Document([SEPARATOR_ID, *encode("\n".join(self.sentences[at : at + 4])[:160]), END], 0, [], [])
        if rng.random() < RANDOM_LETTERS[kind]:
            source = random_letters(rng, LONGEST_RANDOM)
        else:
            source = self.source(rng, LONGEST)
        if kind == "mumbled":
            positions = mumble(source, rng, rng.uniform(0, MUMBLED))
            tokens, seconds, shares = map(list, zip(*positions, strict=True)) if positions else ([], [], [])
        else:
            wrong = rng.uniform(0, WRONG) if kind == "spelling" and rng.random() < 0.5 else 0
            tokens = encode(source) if kind == "copy" else spelling(source, rng, wrong=wrong)
            seconds, shares = [], []
        return Document([*tokens, SEPARATOR_ID, *encode(source), END], len(tokens), seconds, shares)

    def source(self, rng: random.Random, longest: int) -> str:
        words = rng.choice(self.sentences).split()
        if len(words) > 8 and rng.random() < 0.6:
            begin = rng.randrange(len(words) - 3)
            words = words[begin : begin + rng.choice(WORDS)]
        text = " ".join(words)
        while len(text) > longest:
            text = text.rpartition(" ")[0] or text[:longest]
        return text.strip()


def mistaken(letter: str, rng: random.Random) -> int:
    """Another letter, of like sound where there is one, most of the time."""
    if ALIKE.get(letter) and rng.random() < 0.6:
        return encode(rng.choice(ALIKE[letter]))[0]
    return encode(rng.choice(string.ascii_lowercase + " "))[0]


def mumble(text: str, rng: random.Random, wrong: float) -> list[Position]:
    """The letters as a bad ear spells them; `wrong` is about the part of them that has an error."""
    heard = [Position(FILLER)] * rng.randint(0, 8)
    pace, soft = rng.uniform(*PACE), rng.random() < SOFT
    for number, word in enumerate(text.split(" ")):
        rate = min(0.9, wrong * rng.choice(CLARITY))
        for letter in (" " if number else "") + word:
            for position in mishear(letter, rng, rate, soft):
                if heard and heard[-1].token == position.token != FILLER:
                    heard.append(Position(FILLER))
                heard += [position] * rng.choice((1, 1, 1, 2))
                while rng.random() < pace:
                    heard.append(Position(FILLER))
        if rng.random() < 0.08:
            heard += [Position(FILLER)] * rng.randint(2, 12)
    return heard + [Position(FILLER)] * rng.randint(0, 8)


def mishear(letter: str, rng: random.Random, rate: float, soft: bool) -> list[Position]:
    """What is heard of one letter: one position, none or two."""
    (right,) = encode(letter)
    error = rng.choices(list(ERRORS), list(ERRORS.values()))[0] if rng.random() < rate else ""
    if error == "s":
        return [Position(mistaken(letter, rng), right, rng.uniform(0, 0.5) if soft and rng.random() < 0.7 else 0.0)]
    if error == "d":
        return [Position(FILLER, right, rng.uniform(0, 0.5))] if soft and rng.random() < 0.6 else []
    heard = [Position(right)]
    if soft and rng.random() < rate:
        second = mistaken(letter, rng) if rng.random() < 0.5 else FILLER
        heard = [Position(right, second, rng.uniform(0, 0.5))]
    if error == "i":
        heard.append(Position(mistaken(letter, rng), FILLER, rng.uniform(0, 0.5) if soft else 0.0))
    return heard


def loss_of(
    model: LanguageModel, weights: dict[str, Tensor], tokens: Tensor, targets: Tensor, seconds: Tensor, shares: Tensor
) -> Tensor:
    """Mean cross-entropy; the computation is in bf16, on a copy of the weights that passes gradients on."""
    rounded = {name: weight if "time_state" in name else weight.bfloat16() for name, weight in weights.items()}
    embedding, share = rounded["emb.weight"], shares[..., None].bfloat16()
    heard = F.embedding(tokens, embedding) * (1 - share) + F.embedding(seconds, embedding) * share
    hidden, _ = torch.func.functional_call(model, rounded, (heard,))
    told = targets >= 0
    normed = F.layer_norm(hidden[told], hidden.shape[-1:], rounded["ln_out.weight"], rounded["ln_out.bias"])
    return F.cross_entropy(F.linear(normed, rounded["head.weight"]).float(), targets[told])


def validate(model: LanguageModel, weights: dict[str, Tensor], sentences: list[str]) -> dict[str, float]:
    """Word error rates of copying after none, 15 and 30 % of errors, and from the letters as they are."""
    rng = random.Random(0)
    model.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    heard = {f"mumbled_{rate}_wer": [[p.token for p in mumble(s, rng, rate / 100)] for s in sentences]
             for rate in (0, 15, 30)}  # fmt: skip
    heard["copy_wer"] = [encode(s) for s in sentences]
    return {name: round(copying_errors(model, sentences, tokens), 1) for name, tokens in heard.items()}


def train(args: argparse.Namespace) -> None:
    sentences = read_sentences(args.text)
    course(
        new_model(args.generation),
        MumbledDocuments(sentences.text, args.seed),
        args,
        before=Path(args.first or CHECKPOINT.format(generation=args.generation)),
        checkpoint=args.checkpoint or Path(OWN_CHECKPOINT.format(generation=args.generation)),
        out=args.out or TINY / f"rwkv{args.generation}-tiny-listening.pth",
        constant=0.4,
        validate=lambda model, weights: validate(model, weights, sentences.validation),
        validate_steps=500,
    )


def course(
    model: LanguageModel,
    documents: Documents,
    args: argparse.Namespace,
    *,
    before: Path,
    checkpoint: Path,
    out: Path,
    constant: float,
    validate: Callable[[LanguageModel, dict[str, Tensor]], dict[str, float]],
    validate_steps: int,
) -> None:
    """Trains on documents as `MumbledDocuments` gives them, prints how it goes, and writes the model in bf16.

    args: steps, batch and lr.
    before: checkpoint of the course before this.
    checkpoint: of this one, every 500 steps; where it is there, the course goes on from it.
    constant: part of the steps after which the learning rate falls.
    """
    own = checkpoint.exists()
    saved = torch.load(checkpoint if own else before, weights_only=True)
    learnt = {name: weight.detach().requires_grad_() for name, weight in saved["weights"].items()}
    weights = learnt | {n: torch.zeros_like(x) for n, x in model.state_dict().items() if n.endswith("time_state")}
    optimizer = new_optimizer(learnt, args.lr)
    optimizer.load_state_dict(saved["optimizer"])
    start, spent = (saved["step"], saved["seconds"]) if own else (0, 0.0)
    began, running = time.perf_counter(), None
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, warmup=100, constant=constant)
        loss = loss_of(model, weights, *documents.batch(step, args.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(learnt.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        done = step + 1
        if done % 100 == 0 or done == args.steps:
            now = spent + time.perf_counter() - began
            line = {"step": done, "loss": round(running, 4), "minutes": round(now / 60, 1)}
            if done % 500 == 0 or done == args.steps:
                state = {"weights": learnt, "optimizer": optimizer.state_dict(), "step": done, "seconds": now}
                save(checkpoint, state)
            if done % validate_steps == 0 or done == args.steps:
                line |= validate(model, weights)
            print(json.dumps(line), flush=True)
    save(out, {name: weight.detach().bfloat16() for name, weight in learnt.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="folder of .txt files: books in English")
    parser.add_argument("--generation", type=int, default=6, choices=(6, 7), help="of RWKV")
    parser.add_argument("--first", type=Path, help=f"of the first course; default: {CHECKPOINT}")
    parser.add_argument("--out", type=Path, help=f"default: {TINY}/rwkv<generation>-tiny-listening.pth")
    parser.add_argument("--checkpoint", type=Path, help=f"default: {OWN_CHECKPOINT}")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=32, help="documents to a step")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
