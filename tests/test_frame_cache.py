"""Cached frames: those of the encoder, never stale, whole after any interruption."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch
from torch import Tensor

import train as entry
from rwkv_speech.data.batches import Batch, SpeechDataset
from rwkv_speech.data.hub import DatasetRow, read_dataset
from rwkv_speech.data.librispeech import read_librispeech
from rwkv_speech.data.loading import loader
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.sample import Row, one_round
from rwkv_speech.errors import UserError
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.mission_file import read_mission_file
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops import OPS
from rwkv_speech.options import DecodingOptions, Options
from rwkv_speech.speech import frame_cache, identity, shards
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, Longest, TooLongError
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.frame_cache import AbsentEncoder, FrameCache
from rwkv_speech.speech.recording import Recording
from rwkv_speech.speech.shards import RECORD_BYTES, Shards, ShardWriter, pack, unpack
from tests.tiny import write_world

SHARED = Path(__file__).parents[1].parent / "shared"
WHISPER = SHARED / "models/whisper-tiny.en"
SPEECH = SHARED / "speech/speechocean762-train"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write_world(folder)
    return folder


@pytest.fixture
def world(original, tmp_path, monkeypatch) -> Path:
    """A model, an encoder of width 32 and 24 recordings, to be changed at will, and a clock that needs no waiting."""
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    return Path(shutil.copytree(original, tmp_path / "world"))


@pytest.fixture
def rows(world) -> list[Row]:
    return read_manifest(world / "train.jsonl")


@pytest.fixture
def recordings(rows) -> list[Recording]:
    return [row.audio for row in rows]


def opened(world: Path, storage: str = "fp16", **settings: object) -> FrameCache:
    cache = FrameCache(world / "cache", storage=storage)
    cache.encoder(str(world / "encoder"), **settings)
    return cache


def filled(world: Path, recordings: list[Recording], storage: str = "fp16", **settings: object) -> FrameCache:
    cache = opened(world, storage)
    cache.fill(recordings, **settings)
    return cache


def exact(world: Path, recording: Recording) -> Tensor:
    return SpeechEncoder.from_pretrained(str(world / "encoder"))([recording.waveform()])[0][0]


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The encoders that are loaded from now on."""
    names, load = [], SpeechEncoder.from_pretrained
    monkeypatch.setattr(
        SpeechEncoder, "from_pretrained", lambda name, **settings: names.append(name) or load(name, **settings)
    )
    return names


def stored_frames(world: Path) -> int:
    """Bytes of all frames that were ever written."""
    return sum(path.stat().st_size for path in world.glob("cache/*/*.frames"))


# What comes out is what the encoder gives


def test_fp16_frames_are_the_encoders(world, recordings):
    cache = filled(world, recordings)
    for recording in recordings:
        frames, samples = cache.read(recording)
        assert frames.dtype is torch.float16
        assert samples == len(recording.waveform())
        torch.testing.assert_close(frames.float(), exact(world, recording), rtol=1e-3, atol=1e-3)


def test_int8_frames_are_off_by_half_a_step_at_most(world, recordings):
    cache = filled(world, recordings, "int8")
    for recording in recordings:
        frames, _ = cache.read(recording)
        expected = exact(world, recording).double()
        step = expected.abs().amax(dim=1, keepdim=True) / 127
        off = (frames.double() - expected).abs() / step
        assert 0.2 < off.max() <= 0.5 + 1e-3  # the encoder itself differs by 1e-6 in other company


def test_int8_worked_by_hand():
    frames = torch.tensor([[127.0, -127.0, 3.4, -0.6], [0.0, 0.0, 0.0, 0.0], [0.0, 1e6, -2e6, 7e3]])
    data = pack(frames, "int8")
    assert len(data) == 3 * (4 + 4)
    kept = unpack(np.frombuffer(data, np.uint8), 4, "int8")
    step = 2e6 / 127
    expected = torch.tensor([[127.0, -127.0, 3.0, -1.0], [0.0] * 4, [0.0, 64 * step, -2e6, 0.0]])
    torch.testing.assert_close(kept, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("value", "storage", "message"),
    [(7e4, "fp16", "as large as 7e.04, beyond the range of fp16"), (float("nan"), "int8", "not finite")],
)
def test_frames_that_cannot_be_kept_are_refused(value, storage, message):
    with pytest.raises(ValueError, match=message):
        pack(torch.tensor([[1.0, value]]), storage)


def test_loss_and_batches_from_the_cache(world, rows):
    """A model without its encoder gives the loss of one that has it, on the same batches."""
    cache = FrameCache(world / "cache", storage="fp16")
    without = SpeechRWKV.from_pretrained(
        world / "model.pth", encoder=str(world / "encoder"), adapter_hidden=32, load_encoder=cache.encoder
    )
    whole = SpeechRWKV.from_pretrained(world / "model.pth", encoder=str(world / "encoder"), adapter_hidden=32)
    whole.adapter.load_state_dict(without.adapter.state_dict())
    cache.fill([row.audio for row in rows])
    assert isinstance(without.speech_encoder, AbsentEncoder)

    def too_long(rendered, samples):
        return "too long" if samples[0] > 19_000 else None

    def batches(model, num_workers=0, **source):
        dataset = SpeechDataset(rows, sample_of=model.sample, renderer=model.renderer, filter=too_long, **source)
        return list(loader(dataset, batch_size=5, shuffle=True, seed=1, num_workers=num_workers))

    from_cache = batches(without, cache=cache, num_workers=1)
    from_files = batches(whole, extract=whole.speech_encoder.extract)
    assert sum(len(batch.bad) for batch in from_cache) > 0
    for ours, theirs in zip(from_cache, from_files, strict=True):
        for name in ("names", "references", "indices", "seconds", "bad", "samples", "group_counts"):
            assert getattr(ours, name) == getattr(theirs, name), name
        for name in ("ids", "labels", "label_slots", "lengths", "frame_lengths", "audio_groups", "audio_slots"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert (ours.is_frames, theirs.is_frames) == (True, False)
        assert ours.audio_sizes == ours.frame_lengths.tolist()
        assert theirs.audio_sizes == theirs.samples
        torch.testing.assert_close(without.loss_sum(ours), whole.loss_sum(theirs), rtol=1e-3, atol=0)
        few = DecodingOptions(max_new_tokens=4)
        assert [x.tokens for x in without.decode(ours, few)] == [x.tokens for x in whole.decode(theirs, few)]
    for samples in (1, 500, 16_000):
        assert without.speech_encoder.frame_count(samples) == whole.speech_encoder.frame_count(samples)
    with pytest.raises(UserError, match="isn't loaded"):
        without.loss([torch.zeros(16_000)], ["a"])


# Never stale


def test_full_cache_needs_no_encoder(world, recordings, loads, monkeypatch):
    before = filled(world, recordings)
    assert len(loads) == 1
    monkeypatch.setattr(SpeechEncoder, "from_pretrained", lambda *_, **__: pytest.fail("the encoder is loaded"))
    cache = FrameCache(world / "cache", storage="fp16")
    encoder = cache.encoder(str(world / "encoder"))
    cache.fill(recordings)
    assert (encoder.name, encoder.width, encoder.frame_rate) == (str(world / "encoder"), 32, 50)
    assert all(torch.equal(cache.read(u)[0], before.read(u)[0]) for u in recordings)


def overwrite(path: Path, seed: int = 0) -> None:
    """Other samples of the same size, and the times of before as far as they can be set."""
    info, status = soundfile.info(path), path.stat()
    noise = np.random.default_rng(seed).standard_normal(info.frames) * 0.1
    soundfile.write(path, noise, info.samplerate, subtype=info.subtype)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("settled", [-1.0, 60.0], ids=["settled", "just-written"])
def test_changed_file_is_noticed(world, recordings, monkeypatch, settled):
    monkeypatch.setattr(identity, "SETTLED", settled)
    running = filled(world, recordings)
    before = running.read(recordings[3])[0]
    time.sleep(0.02)  # a tick of the file system's clock
    overwrite(recordings[3].source)
    with pytest.raises(AudioError, match=r"3\.wav: changed since its frames were cached; start again"):
        running.read(recordings[3])
    after = filled(world, recordings).read(recordings[3])[0].float()
    assert (after - before.float()).abs().max() > 0.1
    torch.testing.assert_close(after, exact(world, recordings[3]), rtol=1e-3, atol=1e-3)


def test_other_speeds_have_frames_of_their_own(world, recordings, monkeypatch):
    """Of a file and of a segment; what is known already is decoded by nobody, also where it lies elsewhere now."""
    whole = recordings[3]
    segment = replace(whole, offset=0.1, duration=0.3)
    filled(world, [whole, segment])
    fast = [replace(x, speed=speed) for x in (whole, segment) for speed in (0.9, 1.1)]
    cache = filled(world, [whole, segment, *fast])
    encoder = SpeechEncoder.from_pretrained(str(world / "encoder"))
    samples, rate = soundfile.read(whole.source, dtype="float32")
    for x in fast:
        part = samples if x.segment is None else samples[round(0.1 * rate) : round(0.4 * rate)]
        expected = soxr.resample(part, rate * x.speed, SAMPLE_RATE, quality="HQ")
        assert abs(cache.samples(x) - len(part) / rate * SAMPLE_RATE / x.speed) <= 1
        frames = encoder([torch.from_numpy(expected)])[0][0]
        torch.testing.assert_close(cache.read(x)[0].float(), frames, rtol=0.02, atol=0.02)
        assert str(x) == str(replace(x, speed=1.0))
        waveform = x.waveform()
        assert torch.equal(torch.cat([*x.blocks()]), waveform)
        assert x.seconds() == pytest.approx(len(waveform) / SAMPLE_RATE, abs=1e-4)
    moved = whole.source.rename(world / "moved.wav")
    monkeypatch.setattr(frame_cache, "load_audio", None)
    monkeypatch.setattr(Recording, "waveform", None)
    cache = filled(world, [replace(x, source=moved) for x in (whole, *fast[:2])])  # fast[:2]: of the file
    assert cache.samples(replace(whole, source=moved, speed=0.9)) > cache.samples(replace(whole, source=moved))


def test_segments_have_frames_of_their_own(world, recordings, loads):
    whole = recordings[0]
    segments = [replace(whole, offset=offset, duration=0.25) for offset in (0.0, 0.2, 0.25)]
    bad = replace(whole, offset=0.25, duration=5.0)
    refused = []
    cache = filled(world, [whole, *segments, bad], on_bad=lambda recording, error: refused.append(str(recording)))
    assert refused == [f"{whole} [5.0 s from 0.25 s]"]
    time.sleep(0.02)
    whole.source.touch()  # no stamp holds any longer
    encoder = SpeechEncoder.from_pretrained(str(world / "encoder"))
    for again in (False, True):
        for recording, first, last in (
            (whole, 0, None),
            *zip(segments, (0, 3200, 4000), (4000, 7200, 8000), strict=True),
        ):
            frames, samples = cache.read(recording)
            expected = encoder([whole.waveform()[first:last]])[0][0]
            assert samples == len(whole.waveform()[first:last])
            torch.testing.assert_close(frames.float(), expected, rtol=1e-3, atol=1e-3)
        if not again:
            loads.clear()
            cache = filled(world, [whole, *segments])
    assert loads == [], "what was only touched is not encoded again"


def test_touched_and_moved_files_keep_their_frames(world, recordings, loads):
    filled(world, recordings)
    os.utime(recordings[0].source)
    shutil.move(recordings[1].source, world / "elsewhere.wav")
    moved = [recordings[0], Recording(world / "elsewhere.wav"), *recordings[2:]]
    size = stored_frames(world)
    for _ in range(2):
        cache = filled(world, moved)
    assert cache.read(moved[0])[0].shape == cache.read(recordings[0])[0].shape
    assert len(loads) == 1
    assert stored_frames(world) == size
    torch.testing.assert_close(cache.read(moved[1])[0].float(), exact(world, moved[1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inside", [True, False], ids=["bytes", "paths"])
def test_rows_of_a_dataset_are_known_without_fetching_where_they_hold_bytes(world, rows, monkeypatch, inside):
    datasets = pytest.importorskip("datasets")
    cells = [row.audio.source.read_bytes() if inside else str(row.audio.source) for row in rows]
    datasets.Dataset.from_dict({"audio": cells, "text": [row.text for row in rows]}).save_to_disk(world / "rows")
    filled(world, [row.audio for row in read_dataset(world / "rows")])
    monkeypatch.setattr(SpeechEncoder, "from_pretrained", lambda *_, **__: pytest.fail("the encoder is loaded"))
    fetched, fetch = [], DatasetRow.fetch
    monkeypatch.setattr(DatasetRow, "fetch", lambda row: fetched.append(row.index) or fetch(row))
    again = [row.audio for row in read_dataset(world / "rows")]
    cache = filled(world, again)
    for recording in again:
        samples = len(recording.waveform())
        fetched.clear()
        assert cache.read(recording)[1] == samples
        assert bool(fetched) != inside


def change_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layers.0.final_layer_norm.bias"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        lambda folder: change_json(folder, "config.json", hidden_act="relu"),
        lambda folder: change_json(folder, "preprocessor_config.json", do_normalize=True),
    ],
    ids=["weight", "config", "feature-extractor"],
)
def test_changed_encoder_is_noticed(world, recordings, loads, change):
    before = filled(world, recordings).read(recordings[0])[0]
    change(world / "encoder")
    after = filled(world, recordings).read(recordings[0])[0]
    assert len(loads) == 2
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.float(), exact(world, recordings[0]), rtol=1e-3, atol=1e-3)


def test_frames_of_another_precision_are_others(world, recordings, loads):
    filled(world, recordings)
    cache = opened(world, dtype=torch.bfloat16)
    with pytest.raises(AudioError, match="changed since"):
        cache.read(recordings[0])
    assert len(loads) == 2


def test_encoder_with_touched_files_is_loaded_and_recognised(world, recordings, loads):
    filled(world, recordings)
    size = stored_frames(world)
    os.utime(world / "encoder/model.safetensors")
    (world / "encoder/tokenizer.json").write_text("{}")
    filled(world, recordings)
    assert len(loads) == 2
    assert stored_frames(world) == size


def test_encoder_that_changes_behind_an_open_cache_is_refused(world, recordings):
    filled(world, recordings[:3])
    cache = opened(world)
    change_weight(world / "encoder")
    with pytest.raises(UserError, match="changed in this moment"):
        cache.fill(recordings)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"identity": "x", "width": 32, "convolutions": 5}'])
def test_damaged_facts_of_an_encoder_are_found_anew(world, recordings, loads, content):
    before = filled(world, recordings).read(recordings[0])[0]
    (facts,) = world.glob("cache/encoders/*.json")
    whole = facts.read_text()
    facts.write_text(content)
    assert torch.equal(filled(world, recordings).read(recordings[0])[0], before)
    assert len(loads) == 2
    assert facts.read_text() == whole


# Whole after any interruption


def keys(count: int) -> list[bytes]:
    return [number.to_bytes(2, "big") * 8 for number in range(count)]


def frames_of(key: bytes, frames: int = 3) -> Tensor:
    return torch.randn(frames, 8, generator=torch.Generator().manual_seed(key[1])).half()


def write_some(folder: Path, storage: str = "fp16") -> Shards:
    found = Shards(folder, width=8, storage=storage)
    with ShardWriter(found) as writer:
        for key in keys(5):
            writer.add(key, frames_of(key), 960)
    found.reload()
    return found


def check_all_but_last(folder: Path) -> None:
    """The last is lost, the others are there, and writing it again mends everything."""
    found = Shards(folder, width=8, storage="fp16")
    *first, last = keys(5)
    assert found.find(last) is None
    with ShardWriter(found) as writer:
        writer.add(last, frames_of(last), 960)
    found.reload()
    for key in (*first, last):
        assert torch.equal(found.read(found.find(key)), frames_of(key))
        assert found.find(key)["samples"] == 960


@pytest.mark.parametrize("left", range(RECORD_BYTES))
def test_index_torn_at_any_byte_of_its_last_record(tmp_path, left):
    write_some(tmp_path)
    (index,) = tmp_path.glob("*.index")
    os.truncate(index, 4 * RECORD_BYTES + left)
    check_all_but_last(tmp_path)


@pytest.mark.parametrize("byte", range(RECORD_BYTES))
def test_index_with_any_byte_of_its_last_record_unwritten(tmp_path, byte):
    write_some(tmp_path)
    (index,) = tmp_path.glob("*.index")
    raw = bytearray(index.read_bytes())
    raw[-RECORD_BYTES + byte] ^= 0xFF
    index.write_bytes(raw)
    check_all_but_last(tmp_path)


@pytest.mark.parametrize("left", range(3 * 8 * 2))
def test_data_torn_at_any_byte_of_its_last_record(tmp_path, left):
    write_some(tmp_path)
    (data,) = tmp_path.glob("*.frames")
    os.truncate(data, 4 * 3 * 8 * 2 + left)
    check_all_but_last(tmp_path)


def test_damaged_data_is_an_error(tmp_path):
    found = write_some(tmp_path)
    (data,) = tmp_path.glob("*.frames")
    raw = bytearray(data.read_bytes())
    raw[10] ^= 1
    data.write_bytes(raw)
    with pytest.raises(UserError, match=r"\.frames is damaged; remove it and start again"):
        found.read(found.find(keys(1)[0]))
    data.unlink()
    assert not len(Shards(tmp_path, width=8, storage="fp16"))


def test_data_files_are_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)  # two records of 48
    found = write_some(tmp_path)
    assert sorted(path.stat().st_size for path in tmp_path.glob("*.frames")) == [48, 96, 96]
    assert all(torch.equal(found.read(found.find(key)), frames_of(key)) for key in keys(5))


def _write_forever(folder: Path) -> None:
    writer = ShardWriter(Shards(folder, width=8, storage="fp16"))
    for number, key in enumerate(keys(60_000)):
        writer.add(key, frames_of(key, frames=500), 1)
        if number % 3 == 2:
            writer.commit()


def test_writer_killed_at_random_moments(tmp_path):
    rng = random.Random(0)
    found = 0
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        process = multiprocessing.get_context("fork").Process(target=_write_forever, args=(folder,))
        process.start()
        while not any(folder.glob("*.index")):  # on a busy machine it may take long to start
            time.sleep(0.001)
        time.sleep(rng.uniform(0.01, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        left = Shards(folder, width=8, storage="fp16")
        assert len(left) % 3 == 0
        for key in keys(len(left)):
            assert torch.equal(left.read(left.find(key)), frames_of(key, frames=500))
        found += len(left)
    assert found > 12


def test_interrupted_filling_ends_with_the_same_bits(world, recordings, monkeypatch):
    monkeypatch.setattr(frame_cache, "_BATCH_SECONDS", 4.0)  # some batches of several
    whole = filled(world, recordings)
    expected = [whole.read(recording)[0] for recording in recordings]
    (index,) = world.glob("cache/*/*.index")
    records = index.stat().st_size // RECORD_BYTES
    for left in (0, 1, 2, 7, records // 2, records - 1):
        for path in world.glob("cache/*/*.index"):
            if path != index:
                path.unlink()
        os.truncate(index, left * RECORD_BYTES)
        again = filled(world, recordings)
        assert all(torch.equal(again.read(u)[0], frames) for u, frames in zip(recordings, expected, strict=True))


def _fill_share(world: Path, rank: int, barrier) -> None:
    filled(
        world,
        [row.audio for row in read_manifest(world / "train.jsonl")],
        rank=rank,
        world_size=2,
        barrier=barrier.wait,
    )


def test_two_processes_fill_it_together(world, recordings):
    expected = filled(world, recordings)
    frames = [expected.read(recording)[0] for recording in recordings]
    size = stored_frames(world)
    shutil.rmtree(world / "cache")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_fill_share, args=(world, rank, barrier)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(world.glob("cache/*/*.frames"))) == 2
    assert stored_frames(world) == size  # nothing was computed twice
    cache = opened(world)
    for recording, alone in zip(recordings, frames, strict=True):
        torch.testing.assert_close(cache.read(recording)[0], alone, rtol=1e-3, atol=1e-3)


def test_recording_that_occurs_twice_is_stored_once(world, recordings):
    shutil.copy(recordings[0].source, world / "copy.wav")
    filled(world, [*recordings, recordings[5], Recording(world / "copy.wav")])
    twice = stored_frames(world)
    shutil.rmtree(world / "cache")
    filled(world, recordings)
    assert stored_frames(world) == twice


# Disk, and recordings that can't be used


@pytest.mark.parametrize("storage", ["fp16", "int8"])
def test_disk_needed_is_said_beforehand_and_true(world, recordings, storage, monkeypatch):
    free = SimpleNamespace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"0\.00 GB are free: make room") as caught:
        filled(world, recordings, storage)
    assert "\n" not in str(caught.value)
    assert ("int8" in str(caught.value)) == (storage == "fp16")
    assert not stored_frames(world)

    def size() -> int:
        return sum(path.stat().st_size for path in world.glob("cache/*-*/*"))

    low, high = 0, 10_000_000  # the least free space that is accepted
    cache = opened(world, storage)
    monkeypatch.setattr(cache, "_encode", lambda *_: None)
    while high - low > 1:
        free.free = (low + high) // 2
        try:
            cache.fill(recordings)
            high = free.free
        except UserError:
            low = free.free
    free.free = high
    filled(world, recordings, storage)
    assert size() == high


def test_bad_recordings_get_no_frames(world, recordings):
    (world / "noise.wav").write_bytes(b"not audio")
    wrong = [Recording(world / "noise.wav"), Recording(world / "absent.wav")]
    bad = []
    cache = opened(world)
    cache.fill([*wrong, *recordings], on_bad=lambda recording, error: bad.append((recording, str(error))))
    assert sorted(recording.source.name for recording, _ in bad) == ["absent.wav", "noise.wav"]
    for recording in wrong:
        with pytest.raises(AudioError, match=str(recording)):
            cache.read(recording)
    assert len(cache.read(recordings[0])[0]) > 10


def test_recordings_that_are_too_long_get_no_frames(world, recordings, loads):
    """Their headers tell, so that they aren't decoded, and the next time the encoder isn't loaded for them."""
    soundfile.write(world / "long.wav", np.zeros(16_000 * 100), 16_000)
    long, longest = Recording(world / "long.wav"), Longest(10.0, "--flag leaves")
    lied = Recording(world / "long.wav", duration=1.0)
    bad = []
    for _ in range(2):
        cache = opened(world)
        cache.fill([long, *recordings], longest=longest, on_bad=lambda recording, error: bad.append(str(error)))
    message = f"{world / 'long.wav'}: lasts 100 s, more than the 10 s that --flag leaves"
    assert bad == [message] * 2
    assert len(loads) == 1
    cache.fill([lied], longest=longest, on_bad=lambda recording, error: bad.append(str(error)))
    assert bad[2:] == [message]
    with pytest.raises(TooLongError, match="lasts 100 s"):
        cache.read(long, longest)


def test_folder_that_cannot_be_made(world):
    with pytest.raises(UserError, match="expected a folder to write to"):
        FrameCache(world / "train.jsonl/cache", storage="fp16").encoder(str(world / "encoder"))


# In a run


def test_training_with_a_full_cache(world, monkeypatch, tmp_path):
    """Filled and full give the same weights bit for bit; without the cache they are close."""

    def train(name: str, *more: str) -> dict[str, Tensor]:
        flags = {"load_model": "model.pth", "encoder": "encoder", "data": "train.jsonl"}
        arguments = [f"--{flag}={world / value}" for flag, value in flags.items()]
        arguments += ["--adapter_hidden=32", "--accelerator=cpu", "--epoch_count=2", "--warmup_steps=2"]
        arguments += ["--num_workers=0", f"--proj_dir={tmp_path / name}", *more]
        assert OPS["train"](Options.parse(arguments)) == 0
        return read_mission_file(max((tmp_path / name).glob("rwkv-adapter-*.pth"))).tensors

    plain = train("plain")
    filling = train("filling", f"--cache_features={world / 'cache'}")
    monkeypatch.setattr(SpeechEncoder, "from_pretrained", lambda *_, **__: pytest.fail("the encoder is loaded"))
    full = train("full", f"--cache_features={world / 'cache'}")
    for name, tensor in full.items():
        assert torch.equal(tensor, filling[name]), name
        torch.testing.assert_close(tensor, plain[name], rtol=0.05, atol=2e-4)


def test_damaged_frames_stop_training_by_one_line_and_are_made_anew(world, tmp_path, capsys, monkeypatch):
    flags = [f"--{flag}={world / value}" for flag, value in (("load_model", "model.pth"), ("encoder", "encoder"))]
    flags += [
        f"--data={world / 'train.jsonl'}",
        f"--cache_features={world / 'cache'}",
        f"--proj_dir={tmp_path / 'out'}",
    ]
    flags += ["--adapter_hidden=32", "--accelerator=cpu", "--epoch_count=1", "--epoch_steps=2", "--num_workers=1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    assert entry.main() == 0
    (data,) = world.glob("cache/*/*.frames")
    raw = bytearray(data.read_bytes())
    raw[:] = bytes(byte ^ 1 for byte in raw)
    data.write_bytes(raw)
    capsys.readouterr()
    assert entry.main() == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith(("train.py: ", "Traceback", "Original"))]
    assert f"{data} is damaged; remove it and start again" in line
    data.unlink()
    assert entry.main() == 0


# On real speech


@pytest.mark.skipif(not (WHISPER.exists() and SPEECH.exists()), reason="../shared is absent")
def test_int8_changes_the_loss_of_real_speech_by_less_than_half_a_percent(tmp_path):
    """With Whisper's encoder and a random RWKV-6 whose adapter and state have learned to make use of the frames."""
    sizes = official_sizes(n_layer=2, n_embd=128, vocab_size=257)
    torch.save(random_weights(sizes, seed=0), tmp_path / "model.pth")
    rows = read_librispeech(SPEECH)[:4]
    recordings = [row.audio for row in rows]
    caches = {storage: FrameCache(tmp_path, storage=storage) for storage in ("fp16", "int8")}
    torch.manual_seed(0)
    model = SpeechRWKV.from_pretrained(tmp_path / "model.pth", encoder=str(WHISPER), adapter_hidden=256)
    for cache in caches.values():
        cache.encoder(str(WHISPER))
        cache.fill(recordings)
    exact_frames = [model.speech_encoder([x.waveform()])[0][0] for x in recordings]

    def batch_of(recordings: list[Recording]) -> Batch:
        samples = [one_round(row.id, [x], row.text.lower()) for row, x in zip(rows, recordings, strict=True)]
        batch = model.prepare(samples)
        return replace(batch, is_frames=True, audio_sizes=batch.frame_lengths.tolist())

    def loss(batch: Batch, frames: list[Tensor]) -> Tensor:
        return model.loss_sum(replace(batch, audio=torch.cat(frames))) / batch.tokens

    batch = batch_of(recordings)
    first = loss(batch, exact_frames).item()
    optimizer = torch.optim.Adam(model.trainable_state_dict().values(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(batch, exact_frames).backward()
        optimizer.step()
    with torch.no_grad():
        expected = loss(batch, exact_frames).item()
        # The frames are made use of: with those of the next recording the transcripts are less likely.
        others = loss(batch_of([*recordings[1:], recordings[0]]), [*exact_frames[1:], exact_frames[0]]).item()
        found = {name: loss(batch, [cache.read(x)[0] for x in recordings]).item() for name, cache in caches.items()}
    change = {name: abs(value - expected) / expected for name, value in found.items()}
    print(f"loss {first:.4f} -> {expected:.4f}, with wrong frames {others:.4f}; relative change by cache: {change}")
    assert others > 1.1 * expected
    assert change["int8"] < 0.005
    assert change["fp16"] < 0.001
