"""Order, sharing between processes, contents of batches, and what becomes of bad samples."""

import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import SequentialSampler

from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import Batch, Collate, SharedBatches, SpeechDataset, loader, reading
from rwkv_speech.data.rendering import Renderer
from rwkv_speech.data.sample import BadSample, Row, Sample, one_round
from rwkv_speech.errors import UserError
from rwkv_speech.lm.tokenizer import Tokenizer
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.audio import Longest
from rwkv_speech.speech.augmentation import SpecAugment
from rwkv_speech.speech.recording import Recording

# A frame to a millisecond, two of them to a position.
RENDERER = Renderer(Tokenizer(257), frame_count=lambda n: n // 16, group_count=lambda n: max(n // 2, 1))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[Row]:
    """Eleven rows; number n is n + 1 milliseconds of the constant n / 100."""
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(11):
        soundfile.write(folder / f"{n}.wav", np.full(16 * (n + 1), n / 100), 16000, subtype="FLOAT")
    return [Row(str(n), f"text {n}", Recording(folder / f"{n}.wav")) for n in range(11)]


def speech(rows, **how) -> SpeechDataset:
    """A waveform itself is what the encoder takes."""
    how = {"extract": lambda waveform: waveform} | how
    return SpeechDataset(rows, sample_of=lambda row: one_round(row.id, [row.audio], row.text), renderer=RENDERER, **how)


def names(batches) -> list[list[str]]:
    return [batch.names for batch in batches]


def test_batch_holds_its_samples_in_step(rows):
    batches = list(loader(speech(rows), batch_size=4, shuffle=False))
    assert names(batches) == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9", "10"]]
    last = batches[-1]
    assert len(last) == 3
    assert last.references == ["text 8", "text 9", "text 10"]
    assert last.indices == [8, 9, 10]
    assert last.samples == [144, 160, 176]
    assert last.seconds == pytest.approx([0.009, 0.010, 0.011])
    assert not last.is_frames
    for n, waveform in zip(last.indices, last.audio.split(last.audio_sizes), strict=True):
        torch.testing.assert_close(waveform, torch.full((16 * (n + 1),), n / 100))


def test_order_is_the_same_for_any_number_of_workers(rows):
    dataset = speech(rows)
    runs = [
        names(loader(dataset, batch_size=3, shuffle=True, seed=5, epoch=2, num_workers=workers))
        for workers in (0, 1, 2)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert sorted((id for batch in runs[0] for id in batch), key=int) == [str(n) for n in range(11)]


def test_order_depends_on_seed_and_epoch_only(rows):
    def order(seed, epoch):
        torch.manual_seed(torch.seed())  # whatever the global stream holds
        return names(loader(speech(rows), batch_size=11, shuffle=True, seed=seed, epoch=epoch))[0]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_loading_leaves_the_global_random_stream_alone(rows):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(loader(speech(rows), batch_size=4, shuffle=True))
    assert torch.equal(torch.rand(3), expected)


def test_shares_worked_by_hand():
    def shares(size, even):
        return [
            list(SharedBatches(SequentialSampler(range(size)), 2, rank=rank, world_size=2, even=even))
            for rank in (0, 1)
        ]

    assert shares(6, even=True) == [[[0, 2], [4]], [[1, 3], [5]]]
    assert shares(5, even=True) == [[[0, 2]], [[1, 3]]]  # 4 would leave one process without a batch
    assert shares(5, even=False) == [[[0, 2], [4]], [[1, 3]]]
    assert shares(1, even=True) == [[[0]], [[0]]]
    assert shares(1, even=False) == [[[0]], []]
    assert shares(0, even=True) == [[], []]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 24, 31])
def test_shares_cover_the_corpus(size, batch_size, world_size):
    def shares(even):
        samplers = [
            SharedBatches(SequentialSampler(range(size)), batch_size, rank=rank, world_size=world_size, even=even)
            for rank in range(world_size)
        ]
        batches = [list(sampler) for sampler in samplers]
        assert [len(sampler) for sampler in samplers] == [len(mine) for mine in batches]
        assert all(0 < len(batch) <= batch_size for mine in batches for batch in mine)
        return batches

    evaluated = [index for mine in shares(even=False) for batch in mine for index in batch]
    assert sorted(evaluated) == list(range(size))

    trained = shares(even=True)
    assert len({len(mine) for mine in trained}) == 1
    counts = np.bincount([index for mine in trained for batch in mine for index in batch], minlength=size)
    if size < world_size:
        assert counts.min() >= 1
    else:
        assert counts.max() == 1
        assert size - counts.sum() < world_size


def test_global_batches_are_the_same_for_one_process_and_two(rows):
    dataset = speech(rows)
    whole = names(loader(dataset, batch_size=4, shuffle=True, seed=3, even=True))
    halves = [
        names(loader(dataset, batch_size=2, shuffle=True, seed=3, even=True, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    together = [set(first) | set(second) for first, second in zip(*halves, strict=True)]
    assert together[:2] == [set(batch) for batch in whole[:2]]


def test_a_step_of_many_utterances_takes_few_descriptors_and_no_shared_memory(rows):
    """512 utterances, with as many answers, where a process may open 256 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        batches = loader(speech([rows[i % 11] for i in range(600)]), batch_size=256, shuffle=False, num_workers=2)
        step = list(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(map(len, step)) == 600
    tensors = [x for batch in step for x in tree_leaves(vars(batch)) if isinstance(x, torch.Tensor)]
    assert len(tensors) > 600
    assert not any(x.is_shared() for x in tensors)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_is_killed_is_one_line(number):
    main = os.getpid()

    class Deadly(Recording):
        def waveform(self, longest=None):
            assert os.getpid() != main
            os.kill(os.getpid(), number)

    rows = [Row("a", "x", Deadly(Path("a.wav")))]
    with (
        pytest.raises(UserError, match=r"^a process that reads audio (is killed|exited).*--num_workers") as caught,
        reading(),
    ):
        list(loader(speech(rows), batch_size=1, shuffle=False, num_workers=1))
    assert "\n" not in str(caught.value)


def test_other_errors_of_workers_stay_what_they_are():
    rows = [Row("a", "x", torch.zeros(160))]
    with pytest.raises(ZeroDivisionError), reading():
        list(loader(speech(rows, extract=lambda _: 1 / 0), batch_size=1, shuffle=False, num_workers=1))


def test_lightning_drives_the_loader(rows):
    lightning = pytest.importorskip("pytorch_lightning")
    seen = []

    class Recorder(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, _):
            assert isinstance(batch, Batch)
            seen.append((self.current_epoch, batch.names))
            return self.weight * sum(batch.seconds)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    dataset = speech([*rows, Row("bad", "x", Recording(Path("missing.wav")))])
    trainer.fit(Recorder(), loader(dataset, batch_size=4, shuffle=True, seed=1, even=True))
    for epoch in (0, 1):
        expected = names(loader(dataset, batch_size=4, shuffle=True, seed=1, epoch=epoch, even=True))
        assert [batch for when, batch in seen if when == epoch] == expected


# Bad samples


@pytest.fixture
def with_bad(tmp_path, rows) -> SpeechDataset:
    """Good, missing, good, not audio, no text, too long."""
    (tmp_path / "noise.wav").write_bytes(b"not audio")
    return speech(
        [
            rows[0],
            Row("missing", "x", Recording(tmp_path / "missing.wav")),
            rows[1],
            Row("noise", "x", Recording(tmp_path / "noise.wav")),
            Row("mute", " \n", rows[2].audio),
            rows[10],
        ],
        filter=lambda rendered, samples: "too long" if samples[0] > 100 else None,
        needs_answer=True,
    )


@pytest.mark.parametrize("set_apart", [False, True])
def test_long_recordings_are_bad_samples_or_set_apart(rows, set_apart):
    bad = Row("missing", "x", Recording(Path("missing.wav")))
    dataset = speech([*rows, bad], longest=Longest(0.009, "--flag leaves"), set_apart=set_apart)
    (batch,) = loader(dataset, batch_size=12, shuffle=False)
    assert batch.names == [str(n) for n in range(9)]
    assert batch.long == ([9, 10] if set_apart else [])
    assert [sample.id for sample in batch.bad] == (["missing"] if set_apart else ["9", "10", "missing"])
    if not set_apart:
        assert batch.bad[0].reason.endswith("9.wav: lasts 0.01 s, more than the 0.009 s that --flag leaves")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_travel_beside_the_good(with_bad, num_workers):
    (batch,) = loader(with_bad, batch_size=6, shuffle=False, num_workers=num_workers)
    assert batch.names == ["0", "1"]
    assert batch.indices == [0, 2]
    assert [sample.id for sample in batch.bad] == ["missing", "noise", "mute", "10"]
    assert "missing.wav" in batch.bad[0].reason
    assert [sample.reason for sample in batch.bad[2:]] == ["text with no tokens", "too long"]
    assert [Path(sample.audio).name for sample in batch.bad] == [
        "missing.wav",
        "noise.wav",
        "2.wav",
        "10.wav",
    ]


def test_batch_of_bad_samples_only(with_bad):
    batch = list(loader(with_bad, batch_size=3, shuffle=False))[1]
    assert (len(batch), batch.seconds, len(batch.bad)) == (0, [], 3)
    assert (len(batch.audio), batch.audio_sizes, batch.samples, batch.group_counts) == (0, [], [], [])
    assert (batch.ids.shape, batch.tokens, batch.masks) == ((0, 0), 0, None)
    for name in ("lengths", "prompt_lengths", "label_slots", "labels", "frame_lengths", "audio_groups", "audio_slots"):
        assert (getattr(batch, name).shape, getattr(batch, name).dtype) == ((0,), torch.int64), name


def test_stop_names_the_first_bad_sample(tmp_path, with_bad):
    bad_audio = BadSamples("stop", tmp_path / "bad_audio.jsonl")
    (batch,) = loader(with_bad, batch_size=6, shuffle=False)
    with pytest.raises(UserError) as error:
        bad_audio.add(batch.bad)
    assert str(tmp_path / "missing.wav") in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"bad sample 10: .*10\.wav: too long; "):
        bad_audio.add(batch.bad[3:])
    bad_audio.add([])
    assert not bad_audio.path.exists()


def test_skip_lists_each_bad_sample_once(tmp_path, with_bad):
    path = tmp_path / "output" / "bad_audio.jsonl"
    first, second = BadSamples("skip", path), BadSamples("skip", path)  # as two processes of a run
    assert first.report() == "no bad samples"
    for epoch in range(3):
        for batch in loader(with_bad, batch_size=2, shuffle=True, epoch=epoch):
            first.add(batch.bad)
    more = BadSample("é", "é.wav", "silent")
    second.add([BadSample("10", str(with_bad.rows[5].audio), "too long"), more])
    first.add([more])
    listed = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(entry["id"] for entry in listed) == ["10", "missing", "mute", "noise", "é"]
    assert listed[-1] == {"id": "é", "audio": "é.wav", "reason": "silent"}
    assert first.report() == f"5 bad samples skipped, listed in {path}"
    assert second.report() == f"2 bad samples skipped, listed in {path}"


def test_a_line_that_a_killed_process_left_half_written_goes(tmp_path):
    path = tmp_path / "bad_audio.jsonl"
    a, b, c = (BadSample(name, f"{name}.wav", "stümm") for name in "abc")
    BadSamples("skip", path).add([a, b])
    whole = path.read_bytes()
    for left in (whole.index(b"\xbc"), len(whole) - 1, whole.index(b"\n") + 1, 5):  # within a letter of two bytes first
        path.write_bytes(whole[:left])
        running = BadSamples("skip", path)
        running.add([c])
        running.add([b, a, c])
        listed = [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]
        assert sorted(listed) == ["a", "b", "c"]


def test_unknown_policy_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected 'stop' or 'skip'"):
        BadSamples("ignore", tmp_path / "bad_audio.jsonl")


# What a batch holds


def collate(samples: list[Sample | BadSample], *, epoch: int = 0, **how) -> Batch:
    dataset = speech((), **how)
    dataset.epoch = epoch
    items = [x if isinstance(x, BadSample) else dataset.read(x, i) for i, x in enumerate(samples)]
    return Collate(RENDERER.group_count, is_frames=False)(items)


def recording(ms: int) -> torch.Tensor:
    """So many frames, half as many positions; the length is also what the waveform holds."""
    return torch.full((16 * ms,), float(ms))


MIXED = [
    one_round("one", ["x", recording(7)], "ab"),
    one_round("none", ["cd"], "abcdef"),
    BadSample("bad", "bad.wav", "silent"),
    one_round("two", [recording(2), "q", recording(11)], ""),
    one_round("short", [recording(1)], "a"),
    one_round("unanswered", [recording(4)], None),
]


def test_samples_of_no_one_and_two_recordings_in_one_batch():
    """Everything by hand; a letter's token is one more than its byte."""
    batch = collate(MIXED)
    assert len(batch) == 5
    assert batch.names == ["one", "none", "two", "short", "unanswered"]
    assert batch.references == ["ab", "abcdef", "", "a", ""]
    assert batch.indices == [0, 1, 3, 4, 5]
    assert batch.bad == [MIXED[2]]
    assert batch.ids.tolist() == [
        [121, 0, 0, 0, 36, 98, 99, 0, 0],
        [100, 101, 36, 98, 99, 100, 101, 102, 103],
        [0, 114, 0, 0, 0, 0, 0, 36, 0],
        [0, 36, 98, 0, 0, 0, 0, 0, 0],
        [0, 0, 36, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.lengths.tolist() == [7, 9, 8, 3, 3]
    assert batch.prompt_lengths.tolist() == [5, 3, 8, 2, 3]
    assert [x.tolist() for x in batch.answers] == [[98, 99], [98, 99, 100, 101, 102, 103], [], [98], []]
    labels = torch.full((5 * 9,), -100)
    labels[batch.label_slots] = batch.labels
    N = -100
    assert labels.view(5, 9).tolist() == [
        [N, N, N, N, 98, 99, 0, N, N],
        [N, N, 98, 99, 100, 101, 102, 103, 0],
        [N, N, N, N, N, N, N, 0, N],
        [N, 98, 0, N, N, N, N, N, N],
        [N, N, N, N, N, N, N, N, N],
    ]
    assert batch.tokens == 3 + 7 + 1 + 2
    assert batch.samples == [16 * 7, 16 * 2, 16 * 11, 16, 16 * 4]
    assert batch.frame_lengths.tolist() == [7, 2, 11, 1, 4]
    assert batch.group_counts == [3, 1, 5, 1, 2]
    assert batch.seconds == pytest.approx([0.007, 0, 0.013, 0.001, 0.004])
    for ms, waveform in zip((7, 2, 11, 1, 4), batch.audio.split(batch.audio_sizes), strict=True):
        assert torch.equal(waveform, recording(ms))
    assert batch.masks is None


def test_every_position_of_a_recording_goes_to_its_own_slot():
    """Position g of recording a is 1000 (a + 1) + g, and -1 where a recording has none."""
    batch = collate(MIXED)
    embedded = 1000 * torch.arange(1, 6)[:, None] + torch.arange(5)  # (A, G)
    embedded[torch.arange(5) >= torch.tensor([[3], [1], [5], [1], [2]])] = -1
    x = batch.ids.flatten().index_copy(0, batch.audio_slots, embedded.flatten()[batch.audio_groups])
    assert x.view(5, 9).tolist() == [
        [121, 1000, 1001, 1002, 36, 98, 99, 0, 0],
        [100, 101, 36, 98, 99, 100, 101, 102, 103],
        [2000, 114, 3000, 3001, 3002, 3003, 3004, 36, 0],
        [4000, 36, 98, 0, 0, 0, 0, 0, 0],
        [5000, 5001, 36, 0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("longest", [1, 2, 11], ids=["less-than-a-group", "one-group", "five-groups"])
def test_positions_are_those_that_the_adapter_makes(longest):
    """Of frames padded to the longest recording, as of each recording alone."""
    torch.manual_seed(0)
    adapter = Adapter(4, 6, downsample_k=2, hidden=8)
    lengths = [n for n in (1, 11, 2, 7) if n <= longest]
    batch = collate([one_round(str(n), [recording(n)], "a") for n in lengths])
    frames = [torch.randn(n, 4) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
    together = adapter(padded, batch.frame_lengths)[0].flatten(0, 1)[batch.audio_groups]
    alone = [adapter(x[None], torch.tensor([len(x)]))[0][0] for x in frames]
    assert [len(x) for x in alone] == batch.group_counts
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_batch_without_a_recording():
    batch = collate(MIXED[1:2])
    assert (len(batch), batch.audio_sizes, batch.group_counts, batch.seconds) == (1, [], [], [0])
    assert batch.audio_groups.shape == batch.audio_slots.shape == batch.frame_lengths.shape == (0,)
    assert batch.ids.tolist() == [[100, 101, 36, 98, 99, 100, 101, 102, 103]]


def test_cached_frames_stand_for_recordings():
    """Of samples of two recordings, none, and one; three channels to a frame."""

    class Cache:
        def read(self, audio: torch.Tensor, longest: None) -> tuple[torch.Tensor, int]:
            frames = len(audio) // 16
            return torch.full((frames, 3), float(frames)), len(audio)

    dataset = speech((), extract=None, cache=Cache())
    samples = [MIXED[3], MIXED[1], MIXED[0]]
    items = [dataset.read(sample, i) for i, sample in enumerate(samples)]
    batch = Collate(RENDERER.group_count, is_frames=True)(items)
    assert batch.is_frames
    assert batch.audio_sizes == batch.frame_lengths.tolist() == [2, 11, 7]
    assert batch.audio.tolist() == [[2.0] * 3] * 2 + [[11.0] * 3] * 11 + [[7.0] * 3] * 7
    assert batch.samples == [32, 176, 112]
    assert batch.seconds == pytest.approx([0.013, 0, 0.007])
    waveforms = collate(samples)
    for name in ("ids", "label_slots", "labels", "audio_groups", "audio_slots"):
        assert torch.equal(getattr(batch, name), getattr(waveforms, name)), name


def test_masks_are_those_of_the_epoch_and_padded_as_frames_are():
    augment = SpecAugment(3, width=40)
    samples = [one_round("a", [recording(30)], "x"), one_round("b", [recording(80)], "x")]
    batch = collate(samples, epoch=5, spec_augment=augment)
    assert (batch.masks.frames.shape, batch.masks.channels.shape) == ((2, 80), (2, 40))
    for i, (name, frames) in enumerate((("a", 30), ("b", 80))):
        drawn = augment(name, frames, 5)
        assert drawn.frames.any() or drawn.channels.any()
        assert torch.equal(batch.masks.frames[i, :frames], drawn.frames)
        assert not batch.masks.frames[i, frames:].any()
        assert torch.equal(batch.masks.channels[i], drawn.channels)


def test_to_moves_what_the_model_computes_with():
    batch = collate(MIXED, spec_augment=SpecAugment(3, width=40))
    batch.step_tokens, batch.epoch = 99, 7
    moved = batch.to("meta")
    inside = {name for name, x in vars(batch).items() if isinstance(x, torch.Tensor)} - {"audio"}
    for name in vars(batch):
        before, after = getattr(batch, name), getattr(moved, name)
        if name in inside:
            assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype), name
            assert before.device.type == "cpu", name
        elif name == "masks":
            assert [x.device.type for x in after] == ["meta", "meta"]
            assert [x.shape for x in after] == [x.shape for x in before]
        else:
            assert after is before, name
    assert batch.to("cpu").masks.frames.equal(batch.masks.frames)
    assert collate(MIXED).to("meta").masks is None


def test_workers_make_the_same_batches(with_bad, rows):
    """In every field: with speech changed and masks drawn anew in an epoch, and bad samples among the good."""

    def batches(num_workers: int, epoch: int) -> list[dict]:
        dataset = speech(
            [*rows[3:], *with_bad.rows, Row("two", "x", recording(40))],
            transform=lambda id, waveform, epoch: waveform.repeat(2) + epoch,
            spec_augment=SpecAugment(3, width=40),
            filter=lambda rendered, samples: "too long" if samples[0] == 176 else None,
        )
        dataset.epoch = epoch
        made = loader(dataset, batch_size=3, shuffle=True, seed=2, epoch=epoch, num_workers=num_workers)
        return [tree_map(lambda x: x.tolist() if isinstance(x, torch.Tensor) else x, vars(batch)) for batch in made]

    alone = batches(0, 1)
    assert alone == batches(2, 1)
    assert sum(len(batch["names"]) for batch in alone) == 11
    assert sum(len(batch["bad"]) for batch in alone) == 4
    assert any(any(map(any, batch["masks"].frames)) for batch in alone)
    assert alone != batches(2, 0)
