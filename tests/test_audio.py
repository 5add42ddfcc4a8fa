"""Audio: every format against what was written, resampling against an analytic sine, and what cannot be used."""

import io
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.speech import decoders
from rwkv_speech.speech.audio import AudioError, audio_blocks, check_waveform, duration, load_audio, to_mono_16k

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
    with pytest.raises(AudioError, match="without a header"):
        load_audio(raw)


@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
def test_other_formats_go_through_ffmpeg(tmp_path, monkeypatch, as_bytes):
    """A stand-in for ffmpeg writes the WAV that the real one would, and notes how it was called."""
    (tmp_path / "out.wav").write_bytes(encode(sine(0.5, 48_000), 48_000, width="FLOAT"))
    tool = tmp_path / "ffmpeg"
    script = f'printf "%s\\n" "$@" > "{tmp_path}/args"\nfor out; do :; done\n/bin/cat "{tmp_path}/out.wav" > "$out"\n'
    tool.write_text("#!/bin/sh\n" + script)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    odd = tmp_path / "-a b$(c).m4a"
    odd.write_bytes(b"\0" * 100)
    loaded = load_audio(odd.read_bytes() if as_bytes else odd)
    assert np.abs(loaded.numpy() - sine(0.5, RATE))[800:-800].max() < 1e-4
    args = (tmp_path / "args").read_text().splitlines()
    assert "-nostdin" in args
    assert as_bytes or f"file:{odd}" in args
    assert duration(odd) == pytest.approx(0.5)


def test_ffmpeg_failing_is_one_line(tmp_path, monkeypatch):
    tool = tmp_path / "ffmpeg"
    tool.write_text("#!/bin/sh\necho 'moov atom not found' >&2\necho second >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AudioError, match=r"^x\.m4a: cannot be read.*\(moov atom not found\)"):
        load_audio(b"\0" * 100, name="x.m4a")


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_real_ffmpeg(tmp_path):
    (tmp_path / "a.wav").write_bytes(encode(sine(1.0, 44_100), 44_100))
    os.spawnlp(os.P_WAIT, "ffmpeg", "ffmpeg", "-nostdin", "-v", "error", "-i", f"{tmp_path}/a.wav", f"{tmp_path}/a.m4a")
    loaded = load_audio(tmp_path / "a.m4a").numpy()
    assert np.abs(np.fft.rfft(loaded[:RATE], RATE)).argmax() == 440


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
