"""Audio: every format against what was written, resampling against an analytic sine, and what cannot be used."""

import io
import logging
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.speech import decoders
from rwkv_speech.speech.audio import (
    AudioError,
    Longest,
    Segment,
    TooLongError,
    audio_blocks,
    check_waveform,
    duration,
    load_audio,
    to_mono_16k,
)
from rwkv_speech.speech.recording import Recording
from tests.tiny import NO_FILES, no_file

SHARED = Path(__file__).parents[1].parent / "shared"
RATE = 16_000


def sine(seconds: float, rate: int, hz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def encode(samples: np.ndarray, rate: int, container: str = "WAV", width: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=width)
    return file.getvalue()


@pytest.mark.parametrize(
    ("container", "width", "tolerance"),
    [
        ("WAV", "PCM_U8", 1 / 127),
        ("WAV", "PCM_16", 1 / 32767),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "FLOAT", 1e-7),
        ("WAV", "DOUBLE", 1e-7),
        ("WAV", "ULAW", 0.02),
        ("FLAC", "PCM_16", 1 / 32767),
        ("FLAC", "PCM_24", 1e-6),
        ("AIFF", "PCM_16", 1 / 32767),
    ],
)
def test_lossless_formats(container, width, tolerance):
    samples = sine(0.3, RATE)
    loaded = load_audio(encode(samples, RATE, container, width))
    assert loaded.dtype is torch.float32
    assert loaded.shape == samples.shape
    assert np.abs(loaded.numpy() - samples).max() <= tolerance


@pytest.mark.parametrize(("container", "width"), [("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", None)])
def test_lossy_formats(container, width):
    samples = sine(1.0, RATE)
    loaded = load_audio(encode(samples, RATE, container, width)).numpy()
    assert abs(len(loaded) - RATE) < 0.1 * RATE
    spectrum = np.abs(np.fft.rfft(loaded[:RATE] * np.hanning(len(loaded[:RATE])), RATE))
    assert spectrum.argmax() == 440
    assert abs(loaded.std() / samples.std() - 1) < 0.1


@pytest.mark.parametrize(("container", "width"), [("WAV", "PCM_16"), ("FLAC", None), ("OGG", "OPUS"), ("MP3", None)])
def test_long_files_are_decoded_in_blocks(container, width, monkeypatch):
    data = encode(np.random.default_rng(0).uniform(-0.5, 0.5, 2 * RATE), RATE, container, width)
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    monkeypatch.setattr(decoders, "_BLOCK", 5_000)
    np.testing.assert_allclose(load_audio(data).numpy(), whole, atol=1e-6)
    assert max(len(block) for block in audio_blocks(data)) == 5_000


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_resampling_in_blocks_is_that_of_the_whole(rate, monkeypatch):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 2 * rate + 7).astype(np.float32)
    monkeypatch.setattr(decoders, "_BLOCK", 1_000)
    assert torch.equal(load_audio(encode(samples, rate, width="FLOAT")), to_mono_16k(samples, rate))


# Segments

SEGMENTS = [(0.0, 0.5), (1.25, 0.7505), (2.3, None), (0.9, 2.1), (2.75, 0.25)]


@pytest.mark.parametrize(
    ("container", "width", "tolerance"),
    [
        ("FLAC", "PCM_16", 0),
        ("FLAC", "PCM_24", 0),
        ("WAV", "PCM_16", 0),
        ("WAV", "FLOAT", 0),
        ("OGG", "VORBIS", 1e-6),
        ("MP3", None, 1e-6),
        ("OGG", "OPUS", 2e-3),  # whose decoder settles within a fraction of a second
    ],
)
def test_a_segment_is_a_slice_of_the_whole(container, width, tolerance, monkeypatch):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * RATE, 2))
    data = encode(noise, RATE, container, width)
    whole = soundfile.read(io.BytesIO(data), dtype="float32")[0].mean(axis=1)
    monkeypatch.setattr(decoders, "_BLOCK", 10_000)
    for offset, length in SEGMENTS:
        expected = whole[round(offset * RATE) :][: length and round(length * RATE)]
        segment = Segment(offset, length)
        loaded = load_audio(data, segment=segment).numpy()
        assert loaded.shape == expected.shape
        assert np.abs(loaded - expected).max() <= tolerance
        assert duration(data, segment=segment) == pytest.approx(len(expected) / RATE, abs=1e-6)


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_a_segment_is_resampled_as_a_file_of_its_own(rate):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 2 * rate).astype(np.float32)
    loaded = load_audio(encode(samples, rate, width="FLOAT"), segment=Segment(0.5, 0.3))
    assert torch.equal(loaded, to_mono_16k(samples[rate // 2 : round(0.8 * rate)], rate))


def test_of_the_rest_of_the_file_nothing_is_decoded(monkeypatch):
    data = encode(np.zeros(60 * RATE), RATE, "FLAC")
    frames, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, n, **how: frames.append(n) or read(file, n, **how))
    longest = Longest(2.0, "--ctx_len 40 leaves")
    assert len(load_audio(data, segment=Segment(30.0, 1.5), longest=longest)) == 1.5 * RATE
    assert sum(frames) == 1.5 * RATE
    for ask in (load_audio, duration):
        with pytest.raises(TooLongError, match=r"lasts 3 s, more than the 2 s that --ctx_len 40"):
            ask(data, segment=Segment(30.0, 3.0), longest=longest)


@pytest.mark.parametrize("container", ["FLAC", "MP3", "AU"])
def test_what_reaches_past_the_end_of_the_file(container, tmp_path, stand_in):
    stand_in("/bin/cat audio.au")
    path = tmp_path / "a.m4a"
    path.write_bytes(bytes(100) if container == "AU" else encode(sine(0.5, RATE), RATE, container))
    assert len(load_audio(path, segment=Segment(0.3, 0.29))) == 0.2 * RATE, "times are rounded"
    for segment in (Segment(0.3, 0.4), Segment(0.6, 0.1), Segment(0.6), Segment(9.0, 1.0)):
        with pytest.raises(AudioError, match=r"^a part: reaches past the end of its file, which lasts 0\.50 s$"):
            load_audio(path, name="a part", segment=segment)


def test_non_finite_samples_of_a_segment_are_located_in_its_file():
    samples = sine(1.0, RATE)
    samples[[100, 12_000]] = np.nan
    data = encode(samples, RATE, width="FLOAT")
    assert len(load_audio(data, segment=Segment(0.1, 0.5))) == 8_000
    with pytest.raises(AudioError, match=r"the first at 0\.750 s"):
        load_audio(data, segment=Segment(0.5, 0.5))


def test_non_finite_samples_of_later_blocks_are_located(monkeypatch):
    monkeypatch.setattr(decoders, "_BLOCK", 1_000)
    samples = sine(1.0, RATE)
    samples[12_000] = np.nan
    with pytest.raises(AudioError, match=r"the first at 0\.750 s"):
        load_audio(encode(samples, RATE, width="FLOAT"))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_against_the_analytic_sine(rate):
    """A tone inside both bands keeps its frequency, level and phase; the ends, where the filter sees silence, aside."""
    loaded = to_mono_16k(sine(1.0, rate), rate).numpy()
    assert len(loaded) == RATE
    assert np.abs(loaded - sine(1.0, RATE))[800:-800].max() < 1e-4


def test_resampling_removes_what_would_alias():
    assert to_mono_16k(sine(1.0, 44_100, hz=12_000), 44_100).abs()[800:-800].max() < 1e-4


def test_channels_are_averaged():
    left, right = sine(0.2, RATE), sine(0.2, RATE, hz=1_000)
    loaded = load_audio(encode(np.stack([left, right, 0 * left], axis=1), RATE, width="FLOAT"))
    np.testing.assert_allclose(loaded.numpy(), (left + right) / 3, atol=1e-6)


def test_path_and_bytes_agree(tmp_path):
    path = tmp_path / 'it\'s "speech".flac'
    path.write_bytes(encode(sine(0.2, 22_050), 22_050, "FLAC"))
    for source in (str(path), path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes())):
        assert torch.equal(load_audio(source), load_audio(path))
        assert duration(source) == pytest.approx(0.2)


@pytest.mark.parametrize("samples", [np.zeros(1), np.full(1, 0.25), np.zeros(RATE)], ids=["zero", "one", "silence"])
@pytest.mark.parametrize("rate", [8_000, RATE, 48_000])
def test_one_sample_and_silence_are_fine(samples, rate):
    loaded = load_audio(encode(samples, rate, width="FLOAT"))
    assert len(loaded) == max(1, len(samples) * RATE // rate)
    assert loaded.isfinite().all()


def test_no_samples():
    with pytest.raises(AudioError, match=r"quiet\.wav: holds no samples"):
        load_audio(encode(np.zeros(0), RATE), name="quiet.wav")
    assert duration(encode(np.zeros(0), RATE)) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_are_located(value):
    samples = sine(1.0, 48_000)
    samples[24_000] = value
    with pytest.raises(AudioError, match=r"a\.wav: carries NaN or infinite samples, the first at 0\.500 s"):
        load_audio(encode(samples, 48_000, width="DOUBLE"), name="a.wav")


@pytest.mark.parametrize("container", ["WAV", "FLAC", "AIFF", "AU", "W64", "RF64"])
def test_cut_off_files_say_how_much_is_there(container):
    data = encode(np.random.default_rng(0).uniform(-0.5, 0.5, 10 * RATE), RATE, container, "PCM_16")
    with pytest.raises(AudioError, match=r"^b: cut off or damaged: [345]\.\d\d of 10\.0\d s can be decoded"):
        load_audio(data[: len(data) // 2], name="b")
    assert len(load_audio(data)) == 10 * RATE


@pytest.mark.parametrize(("container", "width"), [("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", None)])
def test_cut_off_streams_are_read_as_far_as_they_go(container, width, caplog):
    data = encode(np.random.default_rng(0).uniform(-0.5, 0.5, 10 * RATE), RATE, container, width)
    with caplog.at_level(logging.WARNING, logger="rwkv_speech"):
        load_audio(data)
        assert not caplog.records
        loaded = load_audio(data[: len(data) // 2], name="c.ogg")
    assert 3 * RATE < len(loaded) < 6 * RATE
    assert "c.ogg: seems cut off" in caplog.text


def test_wav_from_a_pipe_has_no_length_to_fall_short_of():
    data = bytearray(encode(sine(0.5, RATE), RATE, width="PCM_16"))
    start = data.index(b"data") + 4
    data[start : start + 4] = data[4:8] = b"\xff" * 4
    assert len(load_audio(bytes(data))) == RATE // 2


def test_flac_of_unstated_length_is_not_read_in_part(monkeypatch):
    data = bytearray(encode(sine(0.5, RATE), RATE, "FLAC"))
    data[21] &= 0xF0  # STREAMINFO: the 36 bits of the number of samples (RFC 9639, section 8.2)
    data[22:26] = bytes(4)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AudioError, match=r"does not say how long it is.*install ffmpeg"):
        load_audio(bytes(data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", r"is empty \(0 bytes\)"),
        (b"RIFF", "cannot be read as audio"),
        (b"<html>404 not found</html>" * 20, "cannot be read as audio.*install ffmpeg"),
    ],
    ids=["absent", "empty", "stub", "html"],
)
@pytest.mark.parametrize("reader", [load_audio, duration])
def test_what_is_not_audio(tmp_path, monkeypatch, content, message, reader):
    monkeypatch.setenv("PATH", "")  # no ffmpeg
    path = tmp_path / "sample.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AudioError, match=f"sample.wav: {message}") as caught:
        reader(path)
    assert "\n" not in str(caught.value)


def test_folder_and_headerless_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AudioError, match="is a folder"):
        load_audio(tmp_path)
    raw = tmp_path / "x.raw"
    raw.write_bytes(bytes(1000))
    with pytest.raises(AudioError, match="cannot be read as audio"):
        load_audio(raw)


# ffmpeg


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A shell script in the place of ffmpeg; `audio.au` beside it is what the real one would write."""
    monkeypatch.setenv("PATH", str(tmp_path))
    samples = np.stack([sine(0.5, 48_000), 0 * sine(0.5, 48_000)], axis=1)
    (tmp_path / "audio.au").write_bytes(encode(samples, 48_000, "AU", "FLOAT"))

    def put(script):
        tool = tmp_path / "ffmpeg"
        tool.write_text(f'#!/bin/sh\ncd "{tmp_path}"\n{script}\n')
        tool.chmod(0o755)

    return put


@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
def test_other_formats_go_through_ffmpeg(tmp_path, stand_in, as_bytes):
    stand_in('printf "%s\\n" "$@" > args; /bin/cat audio.au')
    odd = tmp_path / "-a b$(c).m4a"
    odd.write_bytes(b"\0" * 100)
    loaded = load_audio(odd.read_bytes() if as_bytes else odd)
    assert np.abs(loaded.numpy() - sine(0.5, RATE) / 2)[800:-800].max() < 1e-4
    args = (tmp_path / "args").read_text().splitlines()
    assert "-nostdin" in args
    assert as_bytes or args[args.index("-i") + 1] == f"file:{odd}"
    before = args[: args.index("-i")]
    assert before[before.index("-protocol_whitelist") + 1] == "file"
    allowed = before[before.index("-format_whitelist") + 1].split(",")
    assert {"mov", "matroska", "aac", "asf"} <= set(allowed)
    assert not {"hls", "concat", "concatf", "dash", "sdp", "rtsp", "image2", "lavfi", "vapoursynth"} & set(allowed)
    assert duration(odd) == pytest.approx(0.5)


def test_ffmpeg_decodes_a_file_once_for_all_its_segments(tmp_path, stand_in):
    stand_in("echo >> runs; /bin/cat audio.au")
    path = tmp_path / "a.m4a"
    path.write_bytes(bytes(100))
    whole = load_audio(path)
    for offset in (0.3, 0.1, 0.2):
        assert torch.equal(load_audio(path, segment=Segment(offset, 0.15)), whole[round(offset * RATE) :][:2400])
    assert len((tmp_path / "runs").read_text()) == 2, "once for the whole, once for its segments"
    (tmp_path / "audio.au").write_bytes(encode(sine(0.5, RATE, hz=300), RATE, "AU", "FLOAT"))
    path.write_bytes(bytes(101))
    assert torch.equal(load_audio(path, segment=Segment(0.3, 0.15)), load_audio(path)[4800:7200])


@pytest.mark.parametrize("before", ["", "[mov,mp4,m4a @ 0x55$$ef] ", "$9: "], ids=["", "address", "copy"])
def test_ffmpeg_failing_is_one_line_and_always_the_same(stand_in, before):
    """Bad samples are known again by it."""
    stand_in(f'echo "{before}moov atom not found" >&2\necho second >&2\nexit 1')
    with pytest.raises(AudioError, match=r"^x\.m4a: cannot be read.*neither \(moov atom not found\)"):
        load_audio(b"\0" * 100, name="x.m4a")


def test_ffmpeg_failing_half_way_is_not_taken_for_the_end(stand_in):
    stand_in("/bin/cat audio.au; echo 'broken pipe' >&2; exit 1")
    with pytest.raises(AudioError, match=r"\(broken pipe\)"):
        load_audio(b"\0" * 100)


@pytest.mark.parametrize("before", ["", "/bin/cat audio.au; exec >&-; "], ids=["at-once", "after-its-output"])
def test_ffmpeg_without_an_end_is_ended(tmp_path, stand_in, monkeypatch, before):
    monkeypatch.setattr(decoders, "_PATIENCE", 0.5)
    stand_in(f"echo $$ > pid; {before}exec /bin/sleep 60")
    start = time.monotonic()
    with pytest.raises(AudioError, match="does not come to an end"):
        load_audio(b"\0" * 100)
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ffmpeg ends at its next write")
def test_ffmpeg_ends_with_a_process_that_is_killed(tmp_path, stand_in):
    stand_in("echo $$ > new; /bin/mv new pid; exec /bin/sleep 600")
    read = "from rwkv_speech.speech.decoders import decoding; decoding(bytes(100), 'x').__enter__()"
    reader = subprocess.Popen([sys.executable, "-c", read])
    wait_for((tmp_path / "pid").exists)
    reader.kill()
    reader.wait()
    child = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    wait_for(lambda: not child.exists() or child.read_text().split()[2] == "Z")


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.m4a", "a.mkv", "a.aac", "a.wma", "a.mp4", "a.webm"])
def test_real_ffmpeg(tmp_path, name):
    (tmp_path / "a.wav").write_bytes(encode(sine(1.0, 44_100), 44_100))
    to = ["-vn", str(tmp_path / name)]
    os.spawnlp(os.P_WAIT, "ffmpeg", "ffmpeg", "-nostdin", "-v", "error", "-i", f"{tmp_path}/a.wav", *to)
    loaded = load_audio(tmp_path / name).numpy()
    assert np.abs(np.fft.rfft(loaded[:RATE], RATE)).argmax() == 440


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nneighbour.wav\n",  # without an end
    "concat": "ffconcat version 1.0\nfile neighbour.wav\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="dynamic"></MPD>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
}


@needs_ffmpeg
@pytest.mark.parametrize("content", PLAYLISTS.values(), ids=PLAYLISTS)
@pytest.mark.parametrize("suffix", [".mp3", ".m3u8", ".m4a"])
def test_real_ffmpeg_follows_no_playlist(tmp_path, content, suffix):
    (tmp_path / "neighbour.wav").write_bytes(encode(sine(1.0, RATE), RATE))
    path = tmp_path / f"list{suffix}"
    path.write_text(content)
    start = time.monotonic()
    with pytest.raises(AudioError, match="by ffmpeg neither"):
        load_audio(path)
    assert time.monotonic() - start < 10


# What headers say


@pytest.mark.parametrize("size", [0, 36, 0xFFFFFFFF, 2_000_000_000])
@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
def test_a_wav_file_that_was_never_closed_is_read_as_far_as_it_goes(tmp_path, caplog, size, as_bytes):
    samples = sine(0.5, RATE)
    data = bytearray(encode(samples, RATE, width="PCM_16"))
    start = data.index(b"data") + 4
    data[start : start + 4], data[4:8] = struct.pack("<I", size), struct.pack("<I", min(size + 36, 0xFFFFFFFF))
    path = tmp_path / "killed.wav"
    path.write_bytes(data)
    loaded = load_audio(bytes(data) if as_bytes else path, name="killed.wav")
    assert np.abs(loaded.numpy() - samples).max() <= 1 / 32767
    assert "killed.wav: its header was never closed; going on with the 0.50 s" in caplog.text
    assert path.read_bytes() == bytes(data)


def test_a_wav_file_with_few_samples_before_another_chunk_is_closed(caplog):
    data = encode(np.full(18, 0.5), RATE, width="PCM_16") + b"LIST" + struct.pack("<I", 4) + b"INFO"
    assert len(load_audio(data)) == 18
    nothing = encode(np.zeros(0), RATE, width="PCM_16")
    for more in (b"", *(name + struct.pack("<I", 4) + b"abcd" for name in (b"LIST", b"cue ", b"_PMX"))):
        with pytest.raises(AudioError, match="holds no samples"):
            load_audio(nothing + more)
    assert not caplog.records


@pytest.mark.parametrize("rate", [1, 8, 999, 768_001, 2**31 - 1])
@pytest.mark.parametrize("reader", [load_audio, duration])
def test_impossible_rates_are_refused(rate, reader):
    with pytest.raises(AudioError, match=rf"^a\.wav: has a sample rate of {rate} Hz; expected 1 to 768 kHz$"):
        reader(encode(np.zeros(1000), rate), name="a.wav")


@pytest.mark.parametrize("rate", [1_000, 768_000])
def test_the_lowest_and_the_highest_rate(rate):
    loaded = load_audio(encode(sine(1.0, rate, hz=100), rate, width="FLOAT")).numpy()
    assert np.abs(loaded - sine(1.0, RATE, hz=100))[800:-800].max() < 1e-3


def test_blocks_are_bounded_whatever_becomes_of_them(monkeypatch):
    """By rate and by channels: what a minute is at 1 kHz, and a frame of 1,024 samples."""
    slow = encode(np.zeros(300_000), 1_000, "FLAC")
    assert max(len(block) for block in audio_blocks(slow)) <= 61 * RATE
    wide = encode(np.zeros((5_000, 1_024)), RATE, width="PCM_U8")
    blocks = [len(block) for block in audio_blocks(wide)]
    assert (max(blocks), sum(blocks)) == (1_024, 5_000)


def claiming(container: str, frames: int) -> bytes:
    """Half a second whose header says otherwise."""
    data = bytearray(encode(sine(0.5, RATE), RATE, container))
    if container == "FLAC":
        data[21] = data[21] & 0xF0 | frames >> 32
        data[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    else:
        tag = max(data.find(b"Xing"), data.find(b"Info"))
        assert tag > 0
        data[tag + 8 : tag + 12] = struct.pack(">I", frames // 576)
    return bytes(data)


@pytest.mark.parametrize("container", ["FLAC", "MP3"])
@pytest.mark.parametrize("reader", [load_audio, duration])
def test_lengths_that_the_bytes_cannot_hold_are_refused(container, reader):
    with pytest.raises(AudioError, match=r"^a: claims [\d,]+\.\d hours, which its \d+ bytes can't hold$"):
        reader(claiming(container, 2**35), name="a")


@pytest.mark.parametrize(("level", "words"), [(3.3e38, "samples beyond 1e"), (1e16, "samples beyond 1e"), (1e15, None)])
def test_samples_too_large_to_compute_with(level, words):
    """The mean of two such channels is infinite in float32, and so is the power of one."""
    samples = np.zeros((RATE, 2), np.float32)
    samples[8_000] = level
    data = encode(samples, RATE, width="FLOAT")
    if words is None:
        assert load_audio(data).square().sum().isfinite()
        return
    with pytest.raises(AudioError, match=rf"^a: carries {words}\+15, the first at 0\.500 s"):
        load_audio(data, name="a")
    with pytest.raises(AudioError, match=words):
        check_waveform(samples[:, 0])


# No more than can be used


@pytest.mark.parametrize(("container", "width"), [("WAV", "PCM_16"), ("FLAC", None), ("OGG", "OPUS"), ("MP3", None)])
@pytest.mark.parametrize("rate", [8_000, RATE])
def test_what_is_too_long_is_not_decoded(container, width, rate, monkeypatch):
    """Headers that promise a length are enough; of streams, what fits and a block."""
    monkeypatch.setattr(decoders, "_BLOCK", 1_000)
    decoded = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *x, **how: decoded.append(1_000) or read(*x, **how))
    data = encode(sine(10.0, rate), rate, container, width)
    with pytest.raises(TooLongError, match=r"^a: lasts (10 s, )?more than the 2 s that --flag leaves$"):
        load_audio(data, name="a", longest=Longest(2.0, "--flag leaves"))
    assert sum(decoded) <= (2.2 * rate + 1_000 if container in ("OGG", "MP3") else 0)


@pytest.mark.parametrize("rate", [RATE, 44_100, 22_050, 8_000])
@pytest.mark.parametrize("samples", [16_000, 20_801, 20_799])
def test_a_bound_is_met_to_the_sample(rate, samples):
    data = encode(np.zeros(samples * rate // RATE), rate)
    length = len(load_audio(data))
    assert len(load_audio(data, longest=Longest(length / RATE, ""))) == length
    with pytest.raises(TooLongError):
        load_audio(data, longest=Longest((length - 1) / RATE, ""))


# No file


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize(
    "reader",
    [load_audio, duration, lambda path: Recording(path).read(), lambda path: Recording(path).seconds()],
    ids=["load", "duration", "read", "seconds"],
)
def test_what_is_no_file_is_refused_by_name(tmp_path, kind, reader):
    path = no_file(tmp_path, kind)
    Recording(path).stamp()
    with pytest.raises(AudioError, match=r"x\.wav.*: (is a|cannot be opened \(|its name is not UTF-8)") as caught:
        reader(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.encode()


def test_a_folder_that_cannot_be_searched(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root would be let in
    with pytest.raises(AudioError, match=r"x\.wav: cannot be opened \(Permission denied\)"):
        load_audio(tmp_path / "x.wav")


@pytest.mark.parametrize(
    "waveform",
    [[0.0, 0.5], np.array([0.0, 0.5]), np.array([0.0, 0.5], np.float16), torch.tensor([0.0, 0.5]).double()],
    ids=["list", "float64", "float16", "tensor"],
)
def test_waveforms_from_python(waveform):
    checked = check_waveform(waveform)
    assert checked.dtype is torch.float32
    assert checked.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros((2, 100)), r"shape \(2, 100\); expected 1-D"),
        (0.5, "expected 1-D"),
        (np.zeros(100, np.int16), "holds int16.*divide 16-bit integers by 32768"),
        ([0, 1], "holds int64"),
        ([], "no samples"),
        (torch.tensor([0.0, torch.nan]), "NaN or infinite"),
        (["a"], "not an array of numbers"),
        ([[0.0], [0.0, 1.0]], "not an array of numbers"),
        (np.zeros(3, complex), "holds complex128"),
    ],
    ids=["stereo", "scalar", "int16", "ints", "empty", "nan", "text", "ragged", "complex"],
)
def test_waveforms_that_cannot_be_used(waveform, message):
    with pytest.raises(AudioError, match=f"^item 3: .*{message}"):
        check_waveform(waveform, "item 3")


@pytest.mark.skipif(not (SHARED / "speech/jfk.flac").exists(), reason="../shared/speech is absent")
def test_stereo_44k_speech_keeps_its_length_and_spectrum():
    """The same by the Fourier transform: mean of the channels, spectrum cut at 8 kHz, inverse at the lower rate."""
    path = SHARED / "speech/jfk.flac"
    loaded = load_audio(path).numpy()
    assert len(loaded) == 11 * RATE
    assert duration(path) == 11.0
    samples, rate = soundfile.read(path)
    assert (rate, samples.shape[1]) == (44_100, 2)
    exact = np.fft.irfft(np.fft.rfft(samples.mean(axis=1))[: 11 * RATE // 2 + 1], 11 * RATE) * RATE / rate
    assert np.sqrt(np.mean((loaded - exact) ** 2) / np.mean(exact**2)) < 0.01
