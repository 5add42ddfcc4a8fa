"""Sequences of samples, position by position, worked out by hand in a byte vocabulary: a byte's token is one more."""

import pytest
import torch

from rwkv_speech.data.rendering import NO_LABEL, SEPARATOR_ID, Renderer
from rwkv_speech.data.sample import Message, Sample, one_round
from rwkv_speech.lm.tokenizer import END_OF_TEXT, Tokenizer

# 20 ms to a frame, five frames to a position; as the adapter, one position at least.
RENDERER = Renderer(Tokenizer(257), frame_count=lambda n: n // 320, group_count=lambda n: max(n // 5, 1))
ONE, TWO, THREE = torch.zeros(1600), torch.zeros(3520), torch.zeros(5119)  # of 5, 11 and 15 frames
A, B, C, D = 98, 99, 100, 101  # tokens of letters
N = NO_LABEL


def talk(*parts: tuple) -> Sample:
    """Messages of user and assistant by turns."""
    return Sample("talk", tuple(Message(("user", "assistant")[i % 2], part) for i, part in enumerate(parts)))


def render(sample: Sample):
    return RENDERER(sample, [len(waveform) for waveform in sample.audio])


def test_constants_are_those_of_the_tokenizer_and_of_torch():
    assert Tokenizer(257).encode("#") == Tokenizer().encode("#") == [SEPARATOR_ID] == [36]
    assert torch.nn.CrossEntropyLoss().ignore_index == NO_LABEL
    assert END_OF_TEXT == 0


@pytest.mark.parametrize(
    ("sample", "ids", "labels", "slots", "frames", "prompt_length"),
    [
        pytest.param(one_round("", [TWO], "ab"), [0, 0, 36, A, B], [N, N, A, B, 0], [0, 1], [11], 3, id="one-round"),
        pytest.param(one_round("", [TWO], ""), [0, 0, 36], [N, N, 0], [0, 1], [11], 3, id="empty-answer"),
        pytest.param(one_round("", [TWO], None), [0, 0, 36], [N, N, N], [0, 1], [11], 3, id="no-answer"),
        pytest.param(
            one_round("", [torch.zeros(90)], "é"), [0, 36, 196, 170], [N, 196, 170, 0], [0], [0], 2, id="no-frame"
        ),
        pytest.param(
            one_round("", ["cd", TWO], "a"),
            [C, D, 0, 0, 36, A],
            [N, N, N, N, A, 0],
            [2, 3],
            [11],
            5,
            id="typed-before",
        ),
        pytest.param(
            one_round("", [TWO, "c"], "ab"),
            [0, 0, C, 36, A, B],
            [N, N, N, A, B, 0],
            [0, 1],
            [11],
            4,
            id="typed-after",
        ),
        pytest.param(
            one_round("", ["c", TWO, "d"], None),
            [C, 0, 0, D, 36],
            [N, N, N, N, N],
            [1, 2],
            [11],
            5,
            id="typed-around",
        ),
        pytest.param(one_round("", ["#"], "a"), [36, 36, A], [N, A, 0], [], [], 2, id="typed-alone"),
        pytest.param(
            one_round("", [TWO, ONE, "c", THREE], "a"),
            [0, 0, 0, C, 0, 0, 0, 36, A],
            [N, N, N, N, N, N, N, A, 0],
            [0, 1, 2, 4, 5, 6],
            [11, 5, 15],
            8,
            id="several-recordings",
        ),
        pytest.param(
            talk((TWO,), ("ab",), (ONE,), ("c",)),
            [0, 0, 36, A, B, 0, 0, 36, C],
            [N, N, A, B, 0, N, N, C, 0],
            [0, 1, 6],
            [11, 5],
            8,
            id="two-rounds",
        ),
        pytest.param(
            talk((TWO,), ("ab",), ("d", ONE)),
            [0, 0, 36, A, B, 0, D, 0, 36],
            [N, N, A, B, 0, N, N, N, N],
            [0, 1, 7],
            [11, 5],
            9,
            id="two-rounds-no-answer",
        ),
        pytest.param(
            talk((ONE,), ("",), (TWO,), ("",)),
            [0, 36, 0, 0, 0, 36],
            [N, 0, N, N, N, 0],
            [0, 3, 4],
            [5, 11],
            6,
            id="two-rounds-empty-answers",
        ),
        pytest.param(
            talk((ONE,), ("a", "b"), ("c",), ("d",), (TWO,), ("a",)),
            [0, 36, A, B, 0, C, 36, D, 0, 0, 0, 36, A],
            [N, A, B, 0, N, N, D, 0, N, N, N, A, 0],
            [0, 9, 10],
            [5, 11],
            12,
            id="three-rounds",
        ),
        pytest.param(
            Sample("", (Message("assistant", ("ab",)), Message("user", (TWO,)), Message("assistant", ("c",)))),
            [A, B, 0, 0, 0, 36, C],
            [B, 0, N, N, N, C, 0],
            [3, 4],
            [11],
            6,
            id="the-assistant-first",
        ),
        pytest.param(
            Sample("", (Message("assistant", ("",)), Message("user", ("a",)))),
            [0, A, 36],
            [N, N, N],
            [],
            [],
            3,
            id="the-assistant-first-silent",
        ),
    ],
)
def test_sequence_by_hand(sample, ids, labels, slots, frames, prompt_length):
    rendered = render(sample)
    assert rendered.ids.tolist() == ids
    assert rendered.labels.tolist() == labels
    assert rendered.audio_slots.tolist() == slots
    assert rendered.frames == frames
    assert rendered.prompt_length == prompt_length
    assert len(rendered) == len(ids)
    assert {rendered.ids.dtype, rendered.labels.dtype, rendered.audio_slots.dtype} == {torch.int64}


def test_what_counts_is_how_many_samples_are_told():
    """As those of a recording at another speed, whose sample is the same."""
    sample = one_round("", ["c", TWO], "a")
    assert RENDERER(sample, [4800]).ids.tolist() == [C, 0, 0, 0, 36, A]
    assert RENDERER(sample, [3199]).ids.tolist() == [C, 0, 36, A]


def test_every_label_is_what_comes_next():
    """What rounds are asked is what they are asked one by one, each going on from those before."""
    rounds = [(TWO, "c"), ("ab",), (ONE,), ("",), ("d", THREE), ("dcba",)]
    whole = render(talk(*rounds))
    asked = []
    for end in (2, 4, 6):
        part = render(talk(*rounds[:end]))
        assert torch.equal(part.ids, whole.ids[: len(part)])
        assert torch.equal(part.labels, whole.labels[: len(part)])
        start = part.prompt_length - 1
        assert part.labels[start:].tolist() == [*part.ids[start + 1 :].tolist(), END_OF_TEXT]
        asked += range(start, len(part))
    assert (whole.labels != NO_LABEL).nonzero()[:, 0].tolist() == asked
