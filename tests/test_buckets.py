"""Batches of training: alike in length, in an order that seed and epoch settle, shared by processes, resumable."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile
import torch

from rwkv_speech.data import durations
from rwkv_speech.data.batches import Batch, SpeechDataset
from rwkv_speech.data.buckets import bucketed_loader, padding_waste
from rwkv_speech.data.durations import read_durations
from rwkv_speech.data.loading import AccumulationLoader
from rwkv_speech.data.rendering import Renderer
from rwkv_speech.data.sample import Row, one_round
from rwkv_speech.errors import UserError
from rwkv_speech.lm.tokenizer import Tokenizer
from rwkv_speech.speech import identity
from rwkv_speech.speech.augmentation import SPEEDS, WaveformAugmentation
from rwkv_speech.speech.recording import Recording


def like_librispeech(size: int) -> np.ndarray:
    """Lengths in seconds distributed about as those of LibriSpeech's training splits: a few short, most 12 to 16 s."""
    rng = np.random.default_rng(7)
    short = rng.uniform(1.5, 12.0, size)
    long = rng.triangular(11.5, 15.5, 17.0, size)
    return np.where(rng.random(size) < 0.3, short, long)


def speech(rows: Sequence[Row], **how) -> SpeechDataset:
    """A waveform itself is what the encoder takes; each 80 of its samples are a position."""
    return SpeechDataset(
        rows,
        sample_of=lambda row: one_round(row.id, [row.audio], row.text),
        renderer=Renderer(Tokenizer(257), frame_count=lambda n: n // 16, group_count=lambda n: n // 5),
        extract=lambda waveform: waveform,
        **how,
    )


def batches_of(seconds: np.ndarray, *, epochs=(0,), batch_size=4, **how) -> list[list[list[int]]]:
    """The indices of each batch of one process, for each epoch."""
    lengths = how.pop("lengths", lambda epoch: seconds)
    sampler = bucketed_loader(speech(range(len(seconds))), lengths, batch_size=batch_size, **how).batch_sampler
    found = []
    for epoch in epochs:
        sampler.sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(sampler) == len(found[-1])
    return found


def of_processes(seconds: np.ndarray, world_size: int, **how) -> list[list[list[int]]]:
    return [batches_of(seconds, rank=rank, world_size=world_size, **how)[0] for rank in range(world_size)]


def waste(batches: list[list[int]], seconds: np.ndarray) -> float:
    """Padding, counted batch by batch."""
    padded = sum(max(seconds[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(seconds[i] for batch in batches for i in batch) / padded


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"batch_size": 4},
        {"batch_size": 8},
        {"batch_size": 16},
        {"batch_size": 16, "world_size": 8},
        {"batch_size": 4, "world_size": 4, "accumulate": 4},
        {"batch_size": 1, "max_seconds": 60.0},
        {"batch_size": 1, "max_seconds": 240.0, "world_size": 4},
    ],
    ids=["4", "8", "16", "16x8", "4x4x4", "60s", "240sx4"],
)
def test_less_than_5_percent_is_padding(how):
    seconds = like_librispeech(20_000)
    (batches,) = batches_of(seconds, **how)
    assert waste(batches, seconds) < 0.05
    assert padding_waste(batches, seconds) == pytest.approx(waste(batches, seconds))


def test_a_plain_shuffle_wastes_more():
    """What the bound above is worth."""
    seconds = like_librispeech(20_000)
    order = np.random.default_rng(0).permutation(len(seconds))
    assert waste(order.reshape(-1, 8).tolist(), seconds) > 0.15


def test_padding_by_hand():
    seconds = np.array([1.0, 2.0, 4.0, 4.0])
    assert padding_waste([[0, 1], [2, 3]], seconds) == pytest.approx(1 / 12)
    assert padding_waste([[3, 0, 1], [2]], seconds) == pytest.approx(5 / 16)
    assert padding_waste([], seconds) == 0


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"max_seconds": 60.0}], ids=["count", "seconds"])
def test_order_is_random_and_settled_by_seed_and_epoch(how):
    seconds = like_librispeech(20_000)
    first, second = batches_of(seconds, epochs=(0, 1), seed=3, **how)
    assert [first, second] == batches_of(seconds, epochs=(0, 1), seed=3, **how)
    assert first != batches_of(seconds, seed=4, **how)[0]

    pairs = [{frozenset((a, b)) for batch in epoch for a in batch for b in batch if a < b} for epoch in (first, second)]
    assert len(pairs[0] & pairs[1]) < 0.15 * len(pairs[0])  # other company in another epoch
    means = [seconds[batch].mean() for batch in first]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.15  # neither from short to long nor back
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_by_count_nothing_comes_twice_or_is_lost(size, world_size):
    shares = of_processes(like_librispeech(size), world_size, batch_size=2, accumulate=2)
    assert len({len(share) for share in shares}) == 1  # as many batches for each process
    assert all(1 <= len(batch) <= 2 for share in shares for batch in share)
    counts = Counter(i for share in shares for batch in share for i in batch)
    if size < world_size:
        assert set(counts) == set(range(size))
    else:
        assert max(counts.values()) == 1
        assert size - len(counts) < world_size


def test_those_left_out_and_those_in_the_rest_change():
    seconds = np.sort(like_librispeech(16 * 4 + 3))
    shares = [batches_of(seconds, epochs=range(40), batch_size=4, rank=rank, world_size=4) for rank in range(4)]
    left = [set(range(len(seconds))) - {i for s in shares for b in s[epoch] for i in b} for epoch in range(40)]
    assert all(len(each) == 3 for each in left)
    everyone = Counter(i for each in left for i in each)
    assert len(everyone) > 10
    assert min(everyone) < 20  # short and
    assert max(everyone) > 50  # long ones


@pytest.mark.parametrize("size", [64, 61, 1001])
def test_a_step_is_the_same_for_all_shares_of_it(size):
    """Eight utterances to a step: one process, or two or four, or one that accumulates."""
    seconds = like_librispeech(size)

    def steps(batch_size: int, world_size: int, accumulate: int) -> list[set[int]]:
        shares = of_processes(seconds, world_size, batch_size=batch_size, accumulate=accumulate, seed=5)
        micro = [{i for batch in batches for i in batch} for batches in zip(*shares, strict=True)]
        return [set().union(*micro[k : k + accumulate]) for k in range(0, len(micro), accumulate)]

    whole = steps(8, 1, 1)
    assert [len(step) for step in whole[:-1]] == [8] * (math.ceil(size / 8) - 1)
    for shares in ((4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8)):
        assert steps(*shares)[: size // 8] == whole[: size // 8]


def test_processes_get_like_lengths_at_each_step():
    """None waits for another."""
    seconds = like_librispeech(20_000)
    shares = of_processes(seconds, 4, batch_size=4)
    longest = np.array([[seconds[batch].max() for batch in share] for share in shares])
    assert np.mean(longest.max(0) / longest.min(0)) < 1.02


# --- by seconds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("speeds", [(1.0,), SPEEDS], ids=["plain", "speeds"])
def test_padded_seconds_stay_within_the_bound(world_size, speeds):
    seconds, bound = like_librispeech(2_000), 50.0
    change = WaveformAugmentation(1, speeds=speeds)
    ids = [str(i) for i in range(len(seconds))]
    how = {
        "lengths": lambda epoch: change.lengths(ids, seconds, epoch),
        "longest": seconds / min(speeds),
        "max_seconds": bound,
        "epochs": range(5),
        "world_size": world_size,
    }
    shares = [batches_of(seconds, rank=rank, **how) for rank in range(world_size)]
    assert len({len(epoch) for share in shares for epoch in share}) == 1  # the same in each process and epoch
    padded = [
        [max(seconds[i] / change.speed(ids[i], epoch) for i in batch) * len(batch) for batch in share[epoch]]
        for share in shares
        for epoch in range(5)
    ]
    assert max(map(max, padded)) <= bound
    assert np.mean(padded) > 0.65 * bound  # and the bound is made use of, of which 3 x 15 s are nine tenths
    for epoch in range(5):
        counts = Counter(i for share in shares for batch in share[epoch] for i in batch)
        assert set(counts.values()) == {1}
        assert len(counts) == 2_000 - 2_000 % world_size
        assert all(
            len({len(batch) for batch in batches}) == 1 for batches in zip(*(s[epoch] for s in shares), strict=True)
        )


def test_short_and_unknown_lengths_make_no_endless_batch():
    (batches,) = batches_of(np.zeros(1000), max_seconds=10.0)
    assert max(map(len, batches)) <= 100


def test_one_longer_than_the_bound_comes_alone():
    seconds = np.array([5.0, 40.0, 6.0, 5.5, 50.0])
    (batches,) = batches_of(seconds, max_seconds=20.0)
    assert sorted(sorted(batch) for batch in batches) == [[0, 2, 3], [1], [4]]


def test_fewer_utterances_than_processes_is_an_error():
    with pytest.raises(UserError, match="3 utterances can't be shared by 4 processes"):
        batches_of(np.ones(3), max_seconds=20.0, world_size=4)


# --- through the loader, Lightning, and an interruption --------------------------------------------------------------


class Recorder:
    """A change of waveforms that leaves the epoch in them."""

    def __call__(self, id: str, waveform: torch.Tensor, epoch: int) -> torch.Tensor:
        return torch.full_like(waveform, epoch)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Row]:
    """26 rows of 10 to 35 ms."""
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(26):
        soundfile.write(folder / f"{n}.wav", np.zeros(160 + 16 * n), 16000)
    return [Row(f"u{n}", f"text {n}", Recording(folder / f"{n}.wav", duration=n + 10)) for n in range(26)]


WAYS = [
    pytest.param({"batch_size": 2, "accumulate": 2}, id="count"),
    pytest.param({"batch_size": 1, "accumulate": 2, "max_seconds": 60.0}, id="seconds"),
]


def steps_of(corpus: list[Row], *, num_workers: int = 0, limit: int = 0, **how) -> AccumulationLoader:
    seconds = np.array([row.audio.duration for row in corpus], float)
    dataset = speech(corpus, transform=Recorder())
    loader = bucketed_loader(dataset, lambda epoch: seconds, seed=9, num_workers=num_workers, **how)
    return AccumulationLoader(loader, accumulate=how["accumulate"], limit=limit)


def seen(batch: Batch) -> tuple[int, list[str], set[float]]:
    return batch.epoch, batch.names, set(batch.audio.tolist())


@pytest.mark.parametrize("how", WAYS)
def test_workers_change_nothing_and_know_the_epoch(corpus, how):
    runs = []
    for num_workers in (0, 2):
        steps = steps_of(corpus, num_workers=num_workers, **how)
        runs.append([])
        for epoch in range(3):
            steps.batch_sampler.sampler.set_epoch(epoch)
            runs[-1] += [seen(batch) for batch in steps]
    assert runs[0] == runs[1]
    assert {epoch for epoch, _, _ in runs[0]} == {0, 1, 2}
    assert all(heard == {epoch} for epoch, _, heard in runs[0])
    assert Counter(id for _, names, _ in runs[0] for id in names) == {f"u{n}": 3 for n in range(26)}


@pytest.mark.parametrize("limit", [0, 3])
@pytest.mark.parametrize("how", WAYS)
def test_tokens_of_a_step_are_those_of_its_batches(corpus, how, limit):
    batches = list(steps_of(corpus, limit=limit, **how))
    assert len(batches) == (limit * 2 or len(batches_of(np.arange(26) + 10.0, **how)[0]))
    for k in range(0, len(batches), 2):
        group = batches[k : k + 2]
        texts = [text for batch in group for text in batch.references]
        assert {batch.step_tokens for batch in group} == {sum(len(text) + 1 for text in texts)}  # and ends of text


class Model(pl.LightningModule):
    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list = []
        self.stop_after = stop_after

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(seen(batch))
        return self.weight * batch.step_tokens

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, model: Model, batches: AccumulationLoader) -> None:
    """Two epochs, with a checkpoint at each step; goes on from the last one."""
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        callbacks=pl.callbacks.ModelCheckpoint(
            folder, "last", every_n_train_steps=1, enable_version_counter=False, save_on_train_epoch_end=False
        ),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    try:
        trainer.fit(model, batches, ckpt_path=last if last.exists() else None)
    except (KeyboardInterrupt, SystemExit):
        assert model.stop_after is not None


@pytest.mark.parametrize("stop_after", [3, 4, 14, 17])
@pytest.mark.parametrize("how", WAYS)
def test_an_interrupted_run_sees_exactly_the_rest(tmp_path, corpus, how, stop_after):
    whole = Model()
    fit(tmp_path / "whole", whole, steps_of(corpus, **how))
    assert stop_after < len(whole.seen)

    first, second = Model(stop_after), Model()
    fit(tmp_path / "halves", first, steps_of(corpus, **how))
    fit(tmp_path / "halves", second, steps_of(corpus, num_workers=1, **how))
    assert first.seen == whole.seen[:stop_after]
    ready = torch.load(tmp_path / "halves" / "last.ckpt", weights_only=True)
    assert ready["global_step"] == math.ceil(len(whole.seen) / 2 / 2) * 2
    done = stop_after - len(whole.seen) + len(second.seen)
    assert 0 <= done <= 2  # the micro-batches of a step that was not completed are seen again
    assert second.seen == whole.seen[stop_after - done :]
    assert torch.equal(second.weight, whole.weight)


# --- lengths of recordings -------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the files whose headers are read; files are settled as soon as they are written."""
    monkeypatch.setattr(identity, "SETTLED", 0.0)
    opened: list[str] = []
    seconds = Recording.seconds
    monkeypatch.setattr(Recording, "seconds", lambda self: opened.append(Path(str(self)).name) or seconds(self))
    return opened


def wav(path: Path, seconds: float, *, rate: int = 8000) -> Path:
    soundfile.write(path, np.zeros((int(seconds * rate), 2)), rate)
    return path


def test_headers_are_read_once(tmp_path, read, caplog):
    (tmp_path / "no.wav").write_bytes(b"no audio")
    rows = [
        Row("told", "x", Recording(tmp_path / "absent.wav", duration=2.5)),
        Row("a", "x", Recording(wav(tmp_path / "a.wav", 1.5))),
        Row("b", "x", Recording(wav(tmp_path / "b.flac", 0.25, rate=22050))),
        Row("end of a", "x", Recording(tmp_path / "a.wav", offset=1.0)),
        Row("no audio", "x", Recording(tmp_path / "no.wav")),
        Row("absent", "x", Recording(tmp_path / "absent.wav")),
    ]
    cache = tmp_path / "project" / "durations.json"
    expected = [2.5, 1.5, pytest.approx(0.25, abs=1e-4), 0.5, 0, 0]
    assert read_durations(rows, cache).tolist() == expected
    assert sorted(read) == ["a.wav", "a.wav [from 1.0 s]", "absent.wav", "b.flac", "no.wav"]
    assert "2 of 6 recordings" in caplog.text
    assert [path.name for path in cache.parent.iterdir()] == ["durations.json"]

    read.clear()
    assert read_durations(rows, cache).tolist() == expected
    assert sorted(read) == ["absent.wav", "no.wav"]  # perhaps they have been put right

    wav(tmp_path / "a.wav", 3.0)
    assert read_durations(rows, cache)[1] == 3.0
    before = cache.read_bytes()
    read.clear()
    assert read_durations(rows[2:3], cache)[0] == expected[2]
    assert (read, cache.read_bytes()) == ([], before)  # what others asked for stays


@pytest.mark.parametrize(
    "content", ['{"a":', "", "[1]", "null", '{"STAMP": "long"}', '{"STAMP": NaN}', '{"STAMP": -1.0}']
)
def test_a_broken_cache_is_made_anew(tmp_path, read, content):
    cache = tmp_path / "durations.json"
    recording = Recording(wav(tmp_path / "a.wav", 0.5))
    cache.write_text(content.replace("STAMP", recording.stamp()))
    assert read_durations([Row("a", "x", recording)], cache).tolist() == [0.5]
    assert list(json.loads(cache.read_text()).values()) == [0.5]


def test_other_processes_write_nothing(tmp_path, read):
    cache = tmp_path / "durations.json"
    read_durations([Row("a", "x", Recording(wav(tmp_path / "a.wav", 0.5)))], cache, first=False)
    assert not cache.exists()


def test_an_interruption_keeps_what_was_read(tmp_path, read, monkeypatch):
    rows = [Row(str(n), "x", Recording(wav(tmp_path / f"{n}.wav", 0.1))) for n in range(4)]
    monkeypatch.setattr(durations, "_PIECE", 1)
    monkeypatch.setattr(durations, "_THREADS", 1)
    seconds = Recording.seconds

    def interrupted(self):
        if self.source.name == "2.wav":
            raise KeyboardInterrupt
        return seconds(self)

    monkeypatch.setattr(Recording, "seconds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_durations(rows, tmp_path / "durations.json")
    assert len(json.loads((tmp_path / "durations.json").read_text())) >= 2


def test_rows_of_a_dataset_tell_their_length(tmp_path, read):
    datasets = pytest.importorskip("datasets")
    from rwkv_speech.data.hub import read_dataset

    files = [wav(tmp_path / f"{n}.wav", 0.5 + n) for n in range(3)]
    columns = {"audio": [{"bytes": file.read_bytes(), "path": None} for file in files], "text": ["x"] * 3}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "saved"))
    cache = tmp_path / "durations.json"
    for _ in range(2):
        assert read_durations(read_dataset(tmp_path / "saved"), cache).tolist() == [0.5, 1.5, 2.5]
    assert len(read) == 3


def test_a_file_that_a_row_of_a_dataset_points_to_is_known_by_its_own_stamp(tmp_path, read):
    datasets = pytest.importorskip("datasets")
    from rwkv_speech.data.hub import read_dataset

    file = wav(tmp_path / "0.wav", 0.5)
    datasets.Dataset.from_dict({"audio": [str(file)], "text": ["x"]}).save_to_disk(str(tmp_path / "saved"))
    for seconds in (0.5, 0.5, 2.0):  # the last time it has been recorded anew
        if seconds > 1:
            wav(file, seconds)
        assert read_durations(read_dataset(tmp_path / "saved"), tmp_path / "durations.json").tolist() == [seconds]
    assert len(read) == 2
