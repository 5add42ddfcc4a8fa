"""Pretrains the tiny language model: a byte-level RWKV on books, and on copying what came before "#".

`python demo/tiny/make/make_language_model.py --text FOLDER` writes demo/tiny/rwkv6-tiny.pth (bf16), with
`--generation 7` demo/tiny/rwkv7-tiny.pth, which has as many weights. A frozen model can transcribe through an adapter
only if it can repeat, after "#", what it was told before: large models have learnt that from the web, a tiny one is
taught it here. Documents, each ended by token 0:

    text       a few sentences of the books
    copy       source # source                    the source is part of a sentence, or random letters
    spelling   s _ o u _ _ r r c _ e # source     the source letter by letter at an uneven pace, as an adapter tells
                                                  it, a filler byte between; in half of them some letters are wrong

Interrupted, it goes on from its last checkpoint when started again with the same command.
"""

import argparse
import functools
import io
import json
import math
import random
import string
import time
from collections.abc import Iterator
from pathlib import Path

import jiwer
import torch
import torch.nn.functional as F
from sentences import read_sentences
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rwkv_speech.decoding import decode
from rwkv_speech.files import write_whole
from rwkv_speech.lm import model_class
from rwkv_speech.lm.initialise import fresh_weights
from rwkv_speech.lm.language_model import LanguageModel
from rwkv_speech.lm.weights import ModelSizes

TINY = Path(__file__).parents[1]
_OUTER = {"n_layer": 4, "n_embd": 256, "n_head": 4, "head_size": 64, "vocab_size": 257}
SIZES = {
    6: ModelSizes(**_OUTER, dim_ffn=640, dim_mix=32, dim_decay=32),
    7: ModelSizes(**_OUTER, generation=7, dim_ffn=928, dim_decay=32, dim_rate=32, dim_value=32, dim_gate=64),
}
CHECKPOINT = "output/tiny/rwkv{generation}.ckpt"
END, FILLER, SEPARATOR_ID = 0, 1, 36  # end of text; byte 0, which no text has; "#"
LONGEST = 44  # characters of a source, as of the corpus's sentences
IGNORED = -100
KINDS = {"text": 0.2, "copy": 0.25, "spelling": 0.55}
RANDOM_LETTERS = 0.15  # of the sources
WRONG = 0.08  # of the letters of a spelling, at most


def encode(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()]


def decode_bytes(tokens: list[int]) -> str:
    return bytes(max(token - 1, 0) for token in tokens).decode(errors="replace")


class Documents:
    """An endless, seeded supply: the documents of a step depend on the seed and the step alone."""

    TOGETHER = 8  # batches made at once, so that each can have documents of like length

    def __init__(self, sentences: list[str], seed: int) -> None:
        self.sentences, self.seed = sentences, seed
        self.made = functools.lru_cache(maxsize=1)(self._made)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets (size, T), padded on the right; targets to be ignored are negative."""
        pairs = self.made(step // self.TOGETHER, size)[step % self.TOGETHER]
        tokens = pad_sequence([torch.tensor(t[:-1]) for t, _ in pairs], True)
        targets = pad_sequence([torch.tensor([IGNORED] * n + t[n + 1 :]) for t, n in pairs], True, IGNORED)
        return tokens, targets

    def _made(self, group: int, size: int) -> list[list[tuple[list[int], int]]]:
        rng = random.Random(f"{self.seed}-{group}")
        longest = min(LONGEST, 8 + group * self.TOGETHER // 20)  # short ones first: copying comes sooner
        documents = sorted((self.document(rng, longest) for _ in range(self.TOGETHER * size)), key=lambda d: len(d[0]))
        batches = [documents[i * size : (i + 1) * size] for i in range(self.TOGETHER)]
        rng.shuffle(batches)
        return batches

    def document(self, rng: random.Random, longest: int) -> tuple[list[int], int]:
        """Tokens, and how many of them at the beginning need not be predicted."""
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "text":
            at = rng.randrange(len(self.sentences) - 4)
            return [SEPARATOR_ID, *encode("\n".join(self.sentences[at : at + 4])[:120]), END], 0
        source = random_letters(rng, longest) if rng.random() < RANDOM_LETTERS else self.source(rng, longest)
        heard = encode(source)
        if kind == "spelling":
            heard = spelling(source, rng, wrong=rng.uniform(0, WRONG) if rng.random() < 0.5 else 0)
        return [*heard, SEPARATOR_ID, *encode(source), END], len(heard)

    def source(self, rng: random.Random, longest: int) -> str:
        words = rng.choice(self.sentences).split()
        begin = rng.randrange(len(words))
        text = " ".join(words[begin : begin + rng.randint(1, 10)])[:longest]
        return text.strip()


def random_letters(rng: random.Random, longest: int) -> str:
    """Words of random letters, so that copying can't lean on knowing the language."""
    words = ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 8))) for _ in range(8))
    return " ".join(words)[: rng.randint(3, longest)].strip()


def spelling(text: str, rng: random.Random, *, wrong: float) -> list[int]:
    """The letters with pauses between, some held for two steps, some wrong, missing or too many."""
    heard = [FILLER] * rng.randint(0, 6)
    pace = rng.uniform(0.3, 0.6)
    for letter in text:
        error = rng.choice("sdi") if rng.random() < wrong else ""
        letters = {"s": rng.choice(string.ascii_lowercase), "d": "", "i": letter + rng.choice(string.ascii_lowercase)}
        for said in encode(letters.get(error, letter)):
            if heard and heard[-1] == said:
                heard.append(FILLER)
            heard += [said] * rng.choice((1, 1, 1, 2))
            while rng.random() < pace:
                heard.append(FILLER)
    return heard + [FILLER] * rng.randint(0, 6)


def new_model(generation: int) -> LanguageModel:
    return model_class(generation)(SIZES[generation])


def loss_of(model: LanguageModel, weights: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy; the computation is in bf16, on a copy of the weights that passes gradients on."""
    rounded = {name: weight if "time_state" in name else weight.bfloat16() for name, weight in weights.items()}
    hidden, _ = torch.func.functional_call(model, rounded, (tokens,))
    told = targets >= 0
    normed = F.layer_norm(hidden[told], hidden.shape[-1:], rounded["ln_out.weight"], rounded["ln_out.bias"])
    logits = F.linear(normed, rounded["head.weight"])
    return F.cross_entropy(logits.float(), targets[told])


@torch.no_grad()
def copying_errors(model: LanguageModel, sources: list[str], heard: list[list[int]]) -> float:
    """Word error rate of greedy decoding after `heard` and "#", in percent."""
    hypotheses = []
    for at in range(0, len(sources), 32):
        rows = [torch.tensor([*tokens, SEPARATOR_ID]) for tokens in heard[at : at + 32]]
        lengths = torch.tensor([len(row) for row in rows])
        embedded = model.embed(pad_sequence(rows, True))
        found = decode(model, embedded, lengths, max_new_tokens=[2 * LONGEST] * len(rows))
        hypotheses += [decode_bytes(one.tokens) for one in found]
    return 100 * jiwer.wer(sources, hypotheses)


def learning_rate(step: int, steps: int, peak: float, *, warmup: int = 200, constant: float = 0.6) -> float:
    """Warm-up, constant until that part of the steps is over, and then down to a fiftieth as half a cosine."""
    decay = max(0.0, (step / steps - constant) / (1 - constant))
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * decay)) / 2)


def new_optimizer(learnt: dict[str, Tensor], lr: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [weight for weight in learnt.values() if weight.squeeze().ndim > 1]
    vectors = [weight for weight in learnt.values() if weight.squeeze().ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8)


def validate(model: LanguageModel, weights: dict[str, Tensor], sentences: list[str]) -> dict[str, float]:
    rng = random.Random(0)
    current = new_model(model.sizes.generation)
    current.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    noisy = [spelling(s, rng, wrong=0.04) for s in sentences]
    return {
        "copy_wer": copying_errors(current, sentences, [encode(s) for s in sentences]),
        "spelling_wer": copying_errors(current, sentences, [spelling(s, rng, wrong=0) for s in sentences]),
        "wrong_spelling_wer": copying_errors(current, sentences, noisy),
    }


def train(args: argparse.Namespace) -> None:
    sentences = read_sentences(args.text)
    documents = Documents(sentences.text, args.seed)
    model = new_model(args.generation)
    weights = fresh_weights(model.sizes, seed=args.seed)
    weights |= {name: torch.zeros_like(x) for name, x in model.state_dict().items() if name.endswith("time_state")}
    learnt = {name: weight for name, weight in weights.items() if not name.endswith("time_state")}
    for weight in learnt.values():
        weight.requires_grad_()
    optimizer = new_optimizer(learnt, args.lr)

    checkpoint = args.checkpoint or CHECKPOINT.format(generation=args.generation)
    checkpoint, start, spent = Path(checkpoint), 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            for name, weight in learnt.items():
                weight.copy_(saved["weights"][name])
        optimizer.load_state_dict(saved["optimizer"])
        start, spent = saved["step"], saved["seconds"]

    for step, loss in steps(model, weights, optimizer, documents, args, start):
        if step % 100 == 0 or step == args.steps:
            now = spent + time.perf_counter() - args.began
            line = {"step": step, "loss": round(loss, 4), "minutes": round(now / 60, 1)}
            if step % 1000 == 0 or step == args.steps:
                line |= {k: round(v, 2) for k, v in validate(model, weights, sentences.validation).items()}
            print(json.dumps(line), flush=True)
            if step % 500 == 0:
                state = {"weights": learnt, "optimizer": optimizer.state_dict(), "step": step, "seconds": now}
                save(checkpoint, state)
    out = args.out or TINY / f"rwkv{args.generation}-tiny.pth"
    save(Path(out), {name: weight.detach().bfloat16() for name, weight in learnt.items()})


def save(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def steps(
    model: LanguageModel,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    documents: Documents,
    args: argparse.Namespace,
    start: int,
) -> Iterator[tuple[int, float]]:
    """Trains; after each step its number and a running mean of the loss."""
    running = None
    for step in range(start, args.steps):
        tokens, targets = documents.batch(step, args.batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = loss_of(model, weights, tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w for w in weights.values() if w.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        yield step + 1, running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="folder of .txt files: books in English")
    parser.add_argument("--generation", type=int, default=6, choices=SIZES, help="of RWKV")
    parser.add_argument("--out", help=f"default: {TINY}/rwkv<generation>-tiny.pth")
    parser.add_argument("--checkpoint", help=f"default: {CHECKPOINT}")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32, help="documents to a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.began = time.perf_counter()
    train(args)


if __name__ == "__main__":
    main()
