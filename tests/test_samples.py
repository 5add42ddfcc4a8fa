"""From rows to the model's sequence: what is read or refused, where audio goes, what the loss of two rounds is."""

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from rwkv_speech.data.batches import Collate, SpeechDataset, loader
from rwkv_speech.data.rendering import NO_LABEL, Renderer
from rwkv_speech.data.sample import BadSample, Message, Row, Sample, SampleError, one_round
from rwkv_speech.lm.tokenizer import Tokenizer
from rwkv_speech.speech.augmentation import SpecAugment
from rwkv_speech.speech.recording import Recording

WIDTH = 8


def group_count(frames: int) -> int:
    return max(1, frames // 5)


def speech(rows=(), **how) -> SpeechDataset:
    """Ten samples to a frame; what the encoder takes is the waveform itself."""
    renderer = Renderer(Tokenizer(257), frame_count=lambda n: n // 10, group_count=group_count)
    how = {"sample_of": lambda row: one_round(row.id, [row.audio], row.text), "extract": lambda x: x} | how
    return SpeechDataset(rows, renderer=renderer, **how)


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    """Three recordings, of 100, 140 and 180 samples."""
    rows = []
    for n in (100, 140, 180):
        soundfile.write(tmp_path / f"{n}.wav", np.full(n, n / 1000), 16000, subtype="FLOAT")
        rows.append(Row(f"u{n}", "ab", Recording(tmp_path / f"{n}.wav")))
    return rows


# --- reading ---------------------------------------------------------------------------------------------------------


def test_filter_sees_the_recording_and_slots_are_those_of_the_changed_waveform(rows):
    seen = []

    def judge(rendered, samples):
        seen.append((len(rendered.audio_slots), samples))
        return "too long" if samples[0] > 160 else None

    dataset = speech(rows, transform=lambda id, waveform, epoch: waveform.repeat(3), filter=judge)
    first, _, last = (dataset[i] for i in range(3))
    assert seen == [(2, [100]), (2, [140]), (3, [180])]
    assert (first.samples, first.rendered.frames, len(first.rendered.audio_slots)) == ([300], [30], 6)
    assert len(first.audio[0]) == 300
    assert last == BadSample("u180", str(rows[2].audio), "too long")


def test_an_answer_is_needed_in_training_only(rows):
    texts = {"unknown": None, "empty": "", "spaces": " \n"}
    rows = [Row(id, text, rows[0].audio) for id, text in texts.items()]
    bad = [BadSample(id, str(rows[0].audio), "text with no tokens") for id in texts]
    assert [speech(rows, needs_answer=True)[i] for i in range(3)] == bad
    labels = [speech(rows)[i].rendered.labels for i in range(3)]
    assert [int((x != NO_LABEL).sum()) for x in labels] == [0, 1, 3]  # with end of text, where an answer is known


def test_a_row_that_lacks_what_its_mission_needs_is_a_bad_sample(rows):
    def sample_of(row: Row) -> Sample:
        raise SampleError("no language")

    assert speech(rows, sample_of=sample_of)[0] == BadSample("u100", str(rows[0].audio), "no language")


class Cache:
    """In the place of a FrameCache."""

    def read(self, recording: Recording, longest: None) -> tuple[Tensor, int]:
        samples = soundfile.info(recording.source).frames
        return torch.full((samples // 10, WIDTH), samples).half(), samples


def test_cached_frames_are_taken_as_they_are(rows):
    def refuse(*_):
        raise AssertionError("a waveform was read")

    dataset = speech(rows, cache=Cache(), extract=refuse, transform=refuse, spec_augment=SpecAugment(0, WIDTH))
    (batch,) = loader(dataset, batch_size=3, shuffle=False)
    assert batch.is_frames
    assert (batch.samples, batch.audio_sizes, batch.frame_lengths.tolist()) == (
        [100, 140, 180],
        [10, 14, 18],
        [10, 14, 18],
    )
    assert [x.unique().tolist() for x in batch.audio.split(batch.audio_sizes)] == [[100], [140], [180]]
    assert (batch.audio.dtype, batch.masks.frames.shape) == (torch.float16, (3, 18))


@pytest.mark.parametrize("what", ["id", "epoch"])
def test_masks_are_drawn_for_a_sample_in_an_epoch(rows, what):
    def masks(**other) -> Tensor:
        given = {"id": "a", "epoch": 0} | other
        dataset = speech([Row(given["id"], "x", torch.zeros(4000))], spec_augment=SpecAugment(0, WIDTH))
        dataset.epoch = given["epoch"]
        return dataset[0].masks[0].frames

    assert torch.equal(masks(), masks())
    assert not torch.equal(masks(), masks(**{what: 1 if what == "epoch" else "b"}))


# --- where audio goes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_each_position_of_audio_goes_into_its_slot(seed):
    """Random samples, of up to three rounds with up to two recordings each, and of none.

    Group g of recording a is 1000 (a + 1) + g; -1 is what an adapter makes of padding.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(rng.integers(1, 6)):
        turns = []
        for _ in range(rng.integers(1, 4)):
            recordings = [torch.zeros(n) for n in rng.integers(1, 400, rng.integers(3)).tolist()]
            turns.append(Message("user", ("q", *recordings, "q" * int(rng.integers(3)))))
            turns.append(Message("assistant", ("a" * int(rng.integers(4)),)))
        samples.append(Sample(f"s{number}", tuple(turns)))
    dataset = speech()
    batch = Collate(group_count, is_frames=False)([dataset.read(sample, 0) for sample in samples])

    counts = [group_count(len(x) // 10) for sample in samples for x in sample.audio]
    made = torch.full((len(counts), max(counts, default=0)), -1)
    for recording, count in enumerate(counts):
        made[recording, :count] = 1000 * (recording + 1) + torch.arange(count)
    sequences = batch.ids.flatten().index_copy(0, batch.audio_slots, made.flatten()[batch.audio_groups])

    recordings = iter(enumerate(counts, start=1))
    for row, sample in zip(sequences.view_as(batch.ids).tolist(), samples, strict=True):
        expected = []
        for message in sample.messages:
            for part in message.parts:
                if isinstance(part, str):
                    expected += [byte + 1 for byte in part.encode()]
                else:
                    recording, count = next(recordings)
                    expected += [1000 * recording + group for group in range(count)]
            expected.append(36 if message.role == "user" else 0)
        del expected[-1]  # the last end of text is a label only
        assert row == expected + [0] * (len(row) - len(expected))


# --- the model's sequence --------------------------------------------------------------------------------------------


@pytest.fixture
def model(world):
    torch.manual_seed(5)
    return world.speech_rwkv(adapter_hidden=16)


@torch.no_grad()
def embed_alone(model, waveform: Tensor) -> Tensor:
    """(G, C) of one waveform: as many positions as encoder and adapter give."""
    frames, lengths = model.speech_encoder([waveform])
    embeds, valid = model.adapter(frames, lengths)
    return embeds[0, : valid[0]]


@pytest.mark.parametrize("samples", [1, 399, 400, 719, 720, 1679, 1680, 3279, 3280, 16_000, 16_001, 40_000])
def test_positions_are_those_of_the_models_sequence(model, samples):
    """Around the samples at which one frame becomes two, and 4 or 9 frames become 5 or 10: another position."""
    waveform = 0.1 * torch.randn(samples)
    rendered = model.renderer(one_round("id", [waveform], "abc"), [samples])
    groups = len(embed_alone(model, waveform))
    assert len(rendered.audio_slots) == groups
    assert len(rendered) == groups + 1 + 3
    assert model.speech_encoder([waveform])[1].tolist() == rendered.frames


@torch.no_grad()
def test_the_loss_of_two_rounds_by_hand(model):
    """Against a sequence put together by hand, one position after the other, the state carried on between rounds."""
    first, second = 0.1 * torch.randn(9_000), 0.1 * torch.randn(3_000)  # 27 and 9 frames
    for block in model.language_model.blocks:
        block.att.time_state.normal_()

    def tokens(*ids: int) -> Tensor:
        return model.language_model.emb.weight[list(ids)]

    a, b, c, q = 98, 99, 100, 114  # tokens of letters in a vocabulary of 257: the byte + 1
    parts = [tokens(q), embed_alone(model, first), tokens(36, a, b, 0), embed_alone(model, second), tokens(36, c)]
    state, log_probs = None, []
    for x in torch.cat(parts):
        hidden, state = model.language_model(x[None, None], state)
        log_probs.append(model.language_model.logits(hidden)[0, 0].double().log_softmax(0))
    # "q", audio at 1 to 5, "#" at 6, "ab", end of text at 9, audio at 10, "#" at 11, "c"
    asked = {6: a, 7: b, 8: 0, 11: c, 12: 0}
    assert len(log_probs) == 13
    expected = -sum(log_probs[place][label] for place, label in asked.items())

    turns = Message("user", ("q", first)), Message("assistant", ("ab",)), Message("user", (second,))
    batch = model.prepare([Sample("talk", (*turns, Message("assistant", ("c",))))])
    assert dict(zip(batch.label_slots.tolist(), batch.labels.tolist(), strict=True)) == asked
    torch.testing.assert_close(model.loss_sum(batch).double(), expected, rtol=1e-5, atol=0)
