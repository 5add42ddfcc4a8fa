"""Short sentences out of plain-text books, and which of the tiny parts may see which.

`python demo/tiny/make/sentences.py --text FOLDER` prints how many there are of each kind, and some of them.
"""

import argparse
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORDS = range(3, 9)
CHARACTERS = 44
COMMON = 20
"""A word of a short sentence occurs so many times in the books: names and archaisms are hard to synthesise."""
RESERVED = 1560
"""Short sentences that the language model never sees; what is held out comes from them."""
VOCABULARY = 500
"""Spoken sentences have only so many words, the most frequent ones: what a tiny encoder can learn to spell in hours."""
TEST, VALIDATION, TRAIN = 100, 60, 1400
SEED = 1


@dataclass(frozen=True)
class Sentences:
    """Disjoint lists of sentences in lower case, letters, apostrophes and single spaces only."""

    test: list[str]
    validation: list[str]
    train: list[str]
    """For the adapter and the initial state: `TRAIN`, less a few that contain one of the first two lists."""
    spoken: list[str]
    """For pretraining the speech encoder; none contains one of the first three lists."""
    text: list[str]
    """For the language model: all sentences of the books in their order, of any length, but for the reserved ones."""


def read_sentences(folder: str | Path) -> Sentences:
    """Sentences of the .txt files of a folder; the same files give the same lists.

    Raises:
        SystemExit: no text files there, or too few sentences in them.
    """
    files = sorted(Path(folder).glob("*.txt"))
    text = [sentence for file in files for sentence in split(file.read_text(encoding="utf-8", errors="replace"))]
    frequency = Counter(word for sentence in text for word in sentence.split())
    short = sorted(
        {
            sentence
            for sentence in text
            if len(words := sentence.split()) in WORDS
            and len(sentence) <= CHARACTERS
            and all(frequency[word] >= COMMON for word in words)
        }
    )
    random.Random(SEED).shuffle(short)
    vocabulary = {word for word, _ in frequency.most_common(VOCABULARY)}
    reserved, others = (
        [sentence for sentence in part if vocabulary.issuperset(sentence.split())]
        for part in (short[:RESERVED], short[RESERVED:])
    )
    if len(reserved) < TEST + VALIDATION or len(others) < 2 * TRAIN:
        raise SystemExit(f"{folder}: {len(files)} .txt files with {len(others)} easy sentences; expected some books")
    speech = [*reserved, *others]
    held_out = speech[: TEST + VALIDATION]
    corpus, spoken = speech[: TEST + VALIDATION + TRAIN], speech[TEST + VALIDATION + TRAIN :]
    return Sentences(
        test=held_out[:TEST],
        validation=held_out[TEST:],
        train=list(without(corpus[len(held_out) :], held_out)),
        spoken=list(without(spoken, corpus)),
        text=list(without(text, short[:RESERVED])),
    )


def split(text: str) -> Iterator[str]:
    """The sentences of a text, normalised; what holds digits or foreign letters is left out."""
    text = text.replace("\u2019", "'").replace("\u2018", "'").lower()
    text = re.sub(r"\b(mr|mrs|ms|dr|st)\.", r"\1", text)
    for paragraph in re.split(r"\n\s*\n", text):
        for piece in re.split(r"[.?!;:()\[\]]|--|\u2014", paragraph):
            piece = re.sub(r"[\"\u201c\u201d_*,-]|(?<![a-z])'|'(?![a-z])", " ", piece)
            piece = " ".join(piece.split())
            if piece and re.fullmatch(r"[a-z' ]+", piece):
                yield piece


def without(sentences: list[str], reserved: list[str]) -> Iterator[str]:
    """The sentences in which none of the reserved ones occurs as a run of whole words."""
    longest = max(len(sentence.split()) for sentence in reserved)
    taken = set(reserved)
    for sentence in sentences:
        words = sentence.split()
        runs = (
            " ".join(words[i:j])
            for i in range(len(words))
            for j in range(i + WORDS.start, min(len(words), i + longest) + 1)
        )
        if taken.isdisjoint(runs):
            yield sentence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="folder of .txt files")
    sentences = read_sentences(parser.parse_args().text)
    for kind, found in vars(sentences).items():
        print(f"{kind}: {len(found)} sentences, {sum(map(len, found)) / 1e6:.2f} M characters")
        print(*(f"  {sentence}" for sentence in found[:8]), sep="\n")


if __name__ == "__main__":
    main()
