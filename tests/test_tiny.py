"""The small frozen language models of demo/tiny repeat after "#" what came before it."""

import random
from itertools import groupby, product
from pathlib import Path

import jiwer
import pytest
import torch

from rwkv_speech.decoding import decode
from rwkv_speech.lm import load
from rwkv_speech.lm.tokenizer import Tokenizer

TINY = Path(__file__).parents[1] / "demo" / "tiny"


RESERVED = ["only don't blame me", "it is an actual matter of fact", "choose what you will"]
ALPHABETS = ["it is an actual matter of fact", "buenos días", "улыбка моя", "ثمانية", "上海孙中山"]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        *product(["rwkv6-tiny.pth", "rwkv6-tiny-listening.pth", "rwkv7-tiny.pth"], RESERVED),
        *product(["rwkv7-tiny-missions.pth"], ALPHABETS),
    ],
)
def test_it_copies_what_it_has_not_read(file, said):
    model = load(TINY / file, dtype=torch.float32)
    tokenizer = Tokenizer(model.sizes.vocab_size)
    x = model.embed(torch.tensor([tokenizer.encode(said + "#")]))
    (found,) = decode(model, x, torch.tensor([x.shape[1]]), max_new_tokens=[60])
    assert tokenizer.decode(found.tokens) == said


def test_what_is_mumbled_without_errors_spells_the_sentence(monkeypatch):
    """As CTC reads it: repetitions are one letter, fillers none."""
    monkeypatch.syspath_prepend(str(TINY / "make"))
    from make_listening_model import FILLER, mumble

    for seed in range(20):
        heard = mumble("all is well that ends well", random.Random(seed), 0)
        assert {position.share for position in heard} == {0}
        letters = [token for token, _ in groupby(position.token for position in heard) if token != FILLER]
        assert bytes(token - 1 for token in letters) == b"all is well that ends well"
        assert len(heard) > len(letters)


def test_mumbling_misspells_as_much_as_it_is_told(monkeypatch):
    monkeypatch.syspath_prepend(str(TINY / "make"))
    from make_listening_model import FILLER, mumble

    said = "the children went down to the river in the evening"
    rng = random.Random(0)
    heard = [[t for t, _ in groupby(p.token for p in mumble(said, rng, 0.3)) if t != FILLER] for _ in range(300)]
    rate = jiwer.cer([said] * 300, [bytes(t - 1 for t in tokens).decode() for tokens in heard])
    assert 0.2 < rate < 0.35, "0.3 of the letters of a middling word, but at most 0.9 of a mumbled one"
