"""The small frozen language model of demo/tiny repeats after "#" what came before it."""

from pathlib import Path

import pytest
import torch

from rwkv_speech.decoding import decode
from rwkv_speech.rwkv6.model import RWKV6
from rwkv_speech.rwkv6.tokenizer import Tokenizer

TINY = Path(__file__).parents[1] / "demo" / "tiny"


@pytest.mark.parametrize("said", ["only don't blame me", "it is an actual matter of fact", "choose what you will"])
def test_it_copies_reserved_sentences(said):
    model = RWKV6.from_file(TINY / "rwkv6-tiny.pth", dtype=torch.float32)
    tokenizer = Tokenizer(model.sizes.vocab_size)
    x = model.embed(torch.tensor([tokenizer.encode(said + "#")]))
    (found,) = decode(model, x, torch.tensor([x.shape[1]]), max_new_tokens=[60])
    assert tokenizer.decode(found.tokens) == said
