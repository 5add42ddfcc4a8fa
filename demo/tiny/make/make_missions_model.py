"""Teaches the tiny language model what missions need: the third course, after `make_listening_model.py`.

    python demo/tiny/make/make_missions_model.py --text BOOKS --packages PACKAGES

goes on from that script's last checkpoint and writes demo/tiny/rwkv7-tiny-missions.pth (bf16). What PACKAGES holds says
`languages.py`. Large models have met all of this on the web:

    mumbled      as in the second course, English
    alphabets    s h _ a n _ g h a i # 上海                   six languages, as they are written or as they sound
    translate    >en c l _ a v e d e _ ... # Security key.   to English
    add          add: t h _ r e e f i v e # eight         digits; later also a number below fifty and digits
    rounds       t h r e _ e # three  f i _ v e # five  first? # three       each answer ended by token 0; heard words
                 are repeated, and `first?` and `last?` ask for the first ones and those of the round before;
                 after `sum: ` an answer is the sum of the number heard and of the one before, after `total: ` of all

What stands before what is heard, a mission's trained state can stand for. Interrupted, it goes on from its own last
checkpoint.
"""

import argparse
import random
from bisect import bisect
from pathlib import Path
from typing import NamedTuple

import jiwer
import torch
from languages import Language, read_languages, said, sounds
from make_language_model import (
    END,
    FILLER,
    IGNORED,
    SEPARATOR_ID,
    TINY,
    Documents,
    decode_bytes,
    encode,
    new_model,
    spelling,
)
from make_listening_model import OWN_CHECKPOINT as LISTENING_CHECKPOINT
from make_listening_model import MumbledDocuments, Position, course, mumble
from sentences import read_sentences
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rwkv_speech.decoding import decode
from rwkv_speech.lm.language_model import LanguageModel

CHECKPOINT = "output/tiny/rwkv7-missions.ckpt"
PHASES = (4500, 7500)  # steps after which there are other shares of documents
KINDS = {
    "listening": (0.3, 0.15, 0.1),
    "alphabets": (0.3, 0.2, 0.2),
    "translate": (0.15, 0.1, 0.05),
    "add": (0.05, 0.15, 0.15),
    "rounds": (0.2, 0.4, 0.5),
}
TALKS = {"repeat": (1, 1, 1), "sum": (1, 1, 2), "total": (1, 1, 2)}  # the same for conversations
FOREIGN = {"es": 1, "fr": 1, "it": 1, "ru": 2, "ar": 1, "zh": 3}  # how often they come
LONGEST = {"zh": 16, "ru": 90}  # characters of a source; of the others OTHERS
OTHERS = 60
WRONG = 0.3  # of the letters, at most
ROUNDS = 6
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
ONES, TENS = NUMBERS.split(), ("", "", "twenty", "thirty", "forty", "fifty", "sixty")


def number(n: int) -> str:
    """A number below 70 in words."""
    return ONES[n] if n < 20 else f"{TENS[n // 10]} {ONES[n % 10]}" if n % 10 else TENS[n // 10]


class Document(NamedTuple):
    """Positions; of each whether it is to be predicted."""

    positions: list[Position]
    told: list[bool]


def written(text: str) -> list[Position]:
    return [Position(token) for token in encode(text)]


def round_of(heard: list[Position], answer: str) -> Document:
    """What is heard, "#", and what is told: the answer and its end."""
    answered = [Position(token) for token in (*encode(answer), END)]
    positions = [*heard, Position(SEPARATOR_ID), *answered]
    return Document(positions, [False] * (len(heard) + 1) + [True] * len(answered))


def joined(documents: list[Document]) -> Document:
    positions = [position for document in documents for position in document.positions]
    return Document(positions, [told for document in documents for told in document.told])


class MissionDocuments(Documents):
    def __init__(self, sentences: list[str], languages: dict[str, Language], seed: int) -> None:
        super().__init__(sentences, seed)
        self.languages = languages
        self.listening = MumbledDocuments(sentences, seed)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, targets, second tokens and their shares, each (size, T)."""
        documents = self.made(step // self.TOGETHER, size)[step % self.TOGETHER]
        columns = [list(zip(*document.positions, strict=True)) for document in documents]
        tokens = [torch.tensor(tokens[:-1]) for tokens, _, _ in columns]
        targets = [
            torch.tensor([t if told else IGNORED for t, told in zip(tokens[1:], document.told[1:], strict=True)])
            for (tokens, _, _), document in zip(columns, documents, strict=True)
        ]
        seconds = [torch.tensor(seconds[:-1]) for _, seconds, _ in columns]
        shares = [torch.tensor(shares[:-1]) for _, _, shares in columns]
        padded = (pad_sequence(tokens, True), pad_sequence(targets, True, IGNORED))
        return *padded, pad_sequence(seconds, True, FILLER), pad_sequence(shares, True)

    def _made(self, group: int, size: int) -> list[list[Document]]:
        rng = random.Random(f"{self.seed}-{group}")
        phase = bisect(PHASES, group * self.TOGETHER)
        documents = [self.document(rng, phase) for _ in range(self.TOGETHER * size)]
        documents.sort(key=lambda document: len(document.positions))
        batches = [documents[i * size : (i + 1) * size] for i in range(self.TOGETHER)]
        rng.shuffle(batches)
        return batches

    def document(self, rng: random.Random, phase: int) -> Document:
        kind = rng.choices(list(KINDS), [shares[phase] for shares in KINDS.values()])[0]
        if kind == "listening":
            tokens, heard, seconds, shares = self.listening.document(rng, 0)
            rest = len(tokens) - len(seconds)
            positions = list(map(Position, tokens, seconds + [FILLER] * rest, shares + [0.0] * rest))
            return Document(positions, [False] * (heard + 1) + [True] * (len(tokens) - heard - 1))
        if kind == "add":
            numbers = [rng.randrange(10) for _ in range(rng.choice((2, 2, 3)))]
            if phase and rng.random() < 0.3:
                numbers[0] = rng.randrange(50)
            return round_of([*written("add: "), *hear(" ".join(map(number, numbers)), rng)], number(sum(numbers)))
        if kind == "rounds":
            return self.rounds(rng, phase)
        code = rng.choices(list(FOREIGN), list(FOREIGN.values()))[0]
        language = self.languages[code]
        if kind == "translate":
            text, english = rng.choice(language.pairs)
            return round_of([*written(">en "), *hear_foreign(said(text), code, rng)], english)
        text = language.sentence(rng, rng.randint(1, LONGEST.get(code, OTHERS)))
        return round_of(hear_foreign(text, code, rng), text)

    def rounds(self, rng: random.Random, phase: int) -> Document:
        kind = rng.choices(list(TALKS), [shares[phase] for shares in TALKS.values()])[0]
        found, said_before = [], []
        for place in range(rng.randint(2, ROUNDS)):
            if kind == "repeat":
                if place and rng.random() < 0.4:
                    which = rng.choice(("first", "last"))
                    found.append(round_of(written(f"{which}?"), said_before[0 if which == "first" else -1]))
                    continue
                text = number(rng.randrange(10)) if rng.random() < 0.5 else self.few_words(rng)
                said_before.append(text)
                found.append(round_of(hear(text, rng), text))
                continue
            said_before.append(rng.randrange(10))
            answer = sum(said_before if kind == "total" else said_before[-2:])
            before = [] if place else written(f"{kind}: ")
            found.append(round_of([*before, *hear(number(said_before[-1]), rng)], number(answer)))
        return joined(found)

    def few_words(self, rng: random.Random) -> str:
        words = rng.choice(self.sentences).split()
        begin = rng.randrange(len(words))
        return " ".join(words[begin : begin + rng.randint(1, 3)])[:20].strip()


def hear(text: str, rng: random.Random) -> list[Position]:
    return mumble(text, rng, rng.choice((0, 0.05, 0.15)))


def hear_foreign(text: str, code: str, rng: random.Random) -> list[Position]:
    """As it sounds, with errors, or as it is written, at an uneven pace."""
    latin = sounds(text, code)
    if not latin or rng.random() < 0.35:
        return [Position(token) for token in spelling(text, rng, wrong=0)]
    return mumble(latin, rng, rng.uniform(0, WRONG))


@torch.no_grad()
def answers(model: LanguageModel, heard: list[list[int]], longest: int = 200) -> list[str]:
    """Greedily, after "#"."""
    found: list[str] = []
    for at in range(0, len(heard), 32):
        rows = [torch.tensor([*tokens, SEPARATOR_ID]) for tokens in heard[at : at + 32]]
        lengths = torch.tensor([len(row) for row in rows])
        results = decode(model, model.embed(pad_sequence(rows, True)), lengths, max_new_tokens=[longest] * len(rows))
        found += [decode_bytes(result.tokens) for result in results]
    return found


def validate(model: LanguageModel, weights: dict, sentences: list[str], documents: MissionDocuments) -> dict:
    """Error rates in percent: words (characters of Chinese), sums, and answers of the fifth round; chrF of English."""
    from sacrebleu import corpus_chrf

    rng = random.Random(0)
    model.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    heard = [[p.token for p in mumble(s, rng, 0.15)] for s in sentences]
    found = {"mumbled_15_wer": 100 * jiwer.wer(sentences, answers(model, heard))}
    for code, language in documents.languages.items():
        texts = [said(foreign)[: LONGEST.get(code, OTHERS)].strip() for foreign, _ in language.validation]
        rate = jiwer.cer if code == "zh" else jiwer.wer
        latin = [[p.token for p in mumble(sounds(text, code), rng, 0.05)] for text in texts]
        found[f"{code}_sounds"] = 100 * rate(texts, answers(model, latin))
        found[f"{code}_written"] = 100 * rate(texts, answers(model, [spelling(text, rng, wrong=0) for text in texts]))
        english = [english for _, english in language.validation]
        prompts = [[*encode(">en "), *tokens] for tokens in latin]
        found[f"{code}_chrf"] = corpus_chrf(answers(model, prompts), [english]).score
    for kind in ("sum", "total", "first"):
        numbers = [[rng.randrange(10) for _ in range(5)] for _ in range(32)]
        wrong = []
        for row in numbers:
            known, said_now = [], row
            for place in range(5):
                asked = mumble(number(said_now[place]), rng, 0.05)
                if kind != "first" and not place:
                    asked = [*written(f"{kind}: "), *asked]
                if kind == "first" and place == 4:
                    asked = written("first?")
                known += [p.token for p in asked]
                if place == 4:
                    wanted = {"sum": sum(row[3:]), "total": sum(row), "first": row[0]}[kind]
                    wrong.append((known, number(wanted)))
                    break
                partial = {"sum": sum(row[max(0, place - 1) : place + 1]), "total": sum(row[: place + 1])}
                known += [SEPARATOR_ID, *encode(number(partial.get(kind, row[place]))), END]
        told = answers(model, [known for known, _ in wrong], 30)
        right = sum(a == b for a, (_, b) in zip(told, wrong, strict=True))
        found[f"{kind}_wrong"] = 100 - 100 * right / len(wrong)
    return {name: round(value, 1) for name, value in found.items()}


def train(args: argparse.Namespace) -> None:
    sentences = read_sentences(args.text)
    documents = MissionDocuments(sentences.text, read_languages(args.packages), args.seed)
    course(
        new_model(7),
        documents,
        args,
        before=args.second,
        checkpoint=args.checkpoint,
        out=args.out,
        constant=0.5,
        validate=lambda model, weights: validate(model, weights, sentences.validation, documents),
        validate_steps=1000,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="folder of .txt files: books in English")
    parser.add_argument("--packages", required=True, type=Path, help="folder of wheels: see languages.py")
    second = Path(LISTENING_CHECKPOINT.format(generation=7))
    parser.add_argument("--second", type=Path, default=second, help="of the second course (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=TINY / "rwkv7-tiny-missions.pth", help="default: %(default)s")
    parser.add_argument("--checkpoint", type=Path, default=Path(CHECKPOINT), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10500)
    parser.add_argument("--batch", type=int, default=32, help="documents to a step")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=3)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
