"""Audio of any rate, width and number of channels -> one channel of float32 at 16 kHz.

What becomes of unusual input (a transcript, or one `AudioError` that names the file):

    one sample, silence         read as they are
    no samples, 0 bytes         error
    NaN, infinite, beyond 1e15  error, with the time of the first one
    below 1, above 768 kHz      error
    longer than its bytes hold  error
    cut off (FLAC, WAV, ...)    error, with how much of the promised length is there
    cut off (MP3, Ogg)          read as far as it goes, with a warning: these are streams and promise no length
    WAV that was never closed   read as far as it goes, with a warning
    not audio                   error; formats unknown to libsndfile go through ffmpeg where it is installed
    no file, but a pipe, ...    error

Of a segment of a file, that and nothing else of the file is looked at, where libsndfile reads the format:

    begins past the end         error
    ends past the end           error; up to 0.1 s of it are taken for rounded times, and the segment is so much shorter
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr
import torch
from torch import Tensor

from rwkv_speech.speech.decoders import AudioError, Decoded, Encoded, decoding, describe

SAMPLE_RATE = 16_000  # Hz, what every supported encoder was trained on

_SLACK = 0.1  # s that a segment may reach past the end of its file
_LOUDEST = 1e15  # full scale is 1; the sum of squares of larger ones has no room in float32


class Longest(NamedTuple):
    """The most of a recording that can be used, to the sample at 16 kHz.

    why: what sets it, in messages after "the 10 s that": `--ctx_len 2048 leaves`.
    """

    seconds: float
    why: str

    @property
    def samples(self) -> int:
        return round(self.seconds * SAMPLE_RATE)


class Segment(NamedTuple):
    """A part of a recording, both in seconds; without a duration all from there on."""

    offset: float
    duration: float | None = None


class TooLongError(AudioError):
    """Longer than asked for."""


def load_audio(
    source: str | Path | Encoded,
    *,
    name: str | None = None,
    longest: Longest | None = None,
    segment: Segment | None = None,
) -> Tensor:
    """Decode a file, average its channels, resample to 16 kHz.

    Args:
        source: a path, or the bytes of an encoded file (FLAC, WAV, MP3, Ogg/Opus, ...; see the table above).
        name: what to call the audio in errors; the path if left out.
        longest: longer audio is an error, and no more of it is decoded.
        segment: the part to read; cut at the file's own rate, then resampled, as if it were a file of its own. What
            only ffmpeg reads is decoded as a whole, which is kept in memory until another such file is read.

    Returns:
        (samples,) float32 on the CPU, at least one sample. The level is left alone: full scale of integer
        formats is 1, and float formats may go beyond.

    Raises:
        AudioError: as the table at the top of this file says.
        TooLongError: of these, the one that `longest` sets.
    """
    return torch.cat(list(audio_blocks(source, name=name, longest=longest, segment=segment)))


def audio_blocks(
    source: str | Path | Encoded,
    *,
    name: str | None = None,
    longest: Longest | None = None,
    segment: Segment | None = None,
) -> Iterator[Tensor]:
    """What `load_audio` gives, block by block: recordings of any length in the memory of a block.

    Yields:
        (samples,) float32 on the CPU, at least one sample each.

    Raises:
        AudioError: as `load_audio`, once reading comes to what is wrong.
    """
    name = name or describe(source)
    key = None if segment is None else _file_key(source)
    whole = _kept.get(key)
    if whole is None:
        with decoding(source, name) as audio:
            if segment is None or audio.blocks_from is not None:
                yield from _mono_16k(_part(audio, segment, name), name, longest)
                return
            whole = torch.cat(list(_mono_16k(audio, name)))
        if key is not None:
            _kept.clear()
            _kept[key] = whole
    audio = Decoded(SAMPLE_RATE, len(whole), len(whole), iter([whole[:, None].numpy()]))
    yield from _mono_16k(_part(audio, segment, name), name, longest)


def _mono_16k(audio: Decoded, name: str, longest: Longest | None = None) -> Iterator[Tensor]:
    _check_header(audio, name, longest)
    rate = audio.rate
    resample = soxr.ResampleStream(rate, SAMPLE_RATE, 1).resample_chunk if rate != SAMPLE_RATE else _as_it_is
    decoded = given = 0
    for block in audio.blocks:  # (frames, channels)
        _check_samples(block, rate, name, start=audio.first + decoded)
        mono = block.mean(axis=1)
        decoded += len(block)
        samples = resample(mono, last=False)
        if len(samples):
            given += len(samples)
            if longest and given > longest.samples:
                raise _too_long(name, longest)
            yield torch.from_numpy(samples)
    if not decoded:
        raise AudioError(f"{name}: holds no samples; expected speech")
    rest = resample(mono[:0], last=True)
    if not given and not len(rest):
        rest = mono[:1]  # audio shorter than half an output sample resamples to nothing
    if longest and given + len(rest) > longest.samples:
        raise _too_long(name, longest)
    if len(rest):
        yield torch.from_numpy(rest)


# Of the last file of which segments were read that can't be sought in: all its samples, by what changes with it.
_kept: dict[tuple[object, ...] | None, Tensor] = {}


def _file_key(source: str | Path | Encoded) -> tuple[object, ...] | None:
    """None of what is no file."""
    if isinstance(source, Encoded):
        return None
    try:
        found = os.stat(source)
    except (OSError, ValueError):
        return None
    return os.path.abspath(source), found.st_ino, found.st_size, found.st_mtime_ns


def _part(audio: Decoded, segment: Segment | None, name: str) -> Decoded:
    """The frames of a segment; without one, all.

    Raises:
        AudioError: it reaches past the end, which for streams is found when the blocks are read.
    """
    if segment is None:
        return audio
    rate = audio.rate
    first = round(segment.offset * rate)
    count = None if segment.duration is None else max(1, round(segment.duration * rate))
    least = 1 if count is None else max(1, count - round(_SLACK * rate))  # frames there must be

    def past_end(frames: int) -> AudioError:
        return AudioError(f"{name}: reaches past the end of its file, which lasts {frames / rate:.2f} s")

    if audio.frames is not None and first + least > audio.frames:
        raise past_end(audio.frames)
    if audio.estimate is not None and first > audio.estimate:
        raise past_end(audio.estimate)

    def blocks() -> Iterator[np.ndarray]:
        place, given = first if audio.blocks_from else 0, 0
        for block in audio.blocks_from(first, count) if audio.blocks_from else audio.blocks:
            skipped = min(len(block), max(0, first - place))
            place += len(block)
            block = block[skipped:][: None if count is None else count - given]
            if len(block):
                given += len(block)
                yield block
            if given == count:
                return
        if given < least:
            raise past_end(place)

    frames, estimate = (x and min(x - first, count or x) for x in (audio.frames, audio.estimate))
    return Decoded(rate, frames, estimate, blocks(), first=first)


def duration(
    source: str | Path | Encoded,
    *,
    name: str | None = None,
    longest: Longest | None = None,
    segment: Segment | None = None,
) -> float:
    """Length in seconds, by the header alone where it has one; an MP3 without a length tag gives an estimate.

    Raises:
        AudioError: the audio cannot be opened.
        TooLongError: of these, longer than `longest`, unless that is an estimate.
    """
    name = name or describe(source)
    with decoding(source, name) as audio:
        audio = _part(audio, segment, name)
        _check_header(audio, name, longest)
        frames = sum(len(block) for block in audio.blocks) if audio.estimate is None else audio.estimate
        return frames / audio.rate


def to_mono_16k(waveform: np.ndarray, rate: int) -> Tensor:
    """Mean over the channels, then band-limited resampling by soxr (its "HQ" setting, 20 bit).

    Args:
        waveform: (frames,) or (frames, channels), floating point.
        rate: its sample rate in Hz.

    Returns:
        (samples,) float32, about frames * 16000 / rate samples and at least one.
    """
    mono = waveform if waveform.ndim == 1 else waveform.mean(axis=1)
    mono = mono.astype(np.float32, copy=False)
    if rate != SAMPLE_RATE:
        # Audio shorter than half an output sample would resample to nothing.
        resampled = soxr.resample(mono, rate, SAMPLE_RATE)
        mono = resampled if len(resampled) else mono[:1]
    return torch.from_numpy(np.ascontiguousarray(mono))


def at_speed(waveform: Tensor, speed: float) -> Tensor:
    """As if played so many times as fast, the pitch going with it: (samples,) at 16 kHz -> (samples / speed,)."""
    return waveform if speed == 1.0 else to_mono_16k(waveform.numpy(), round(SAMPLE_RATE * speed))


def check_waveform(
    waveform: np.ndarray | Tensor | Sequence[float], name: str = "waveform", longest: Longest | None = None
) -> Tensor:
    """Audio given from Python: 1-D floats at 16 kHz, nothing guessed.

    Args:
        waveform: (samples,) of any floating-point type; its device is kept.
        name: what to call it in errors.
        longest: longer audio is an error.

    Returns:
        (samples,) float32, detached.

    Raises:
        AudioError: not 1-D, not floating point (integer samples have no scale of their own), empty, or
            carrying NaN, infinite values, or some beyond 1e15.
    """
    try:
        tensor = waveform.detach() if isinstance(waveform, Tensor) else torch.as_tensor(np.asarray(waveform))
    except (TypeError, ValueError) as error:
        raise AudioError(f"{name}: not an array of numbers; expected 1-D floats at 16 kHz") from error
    if tensor.ndim != 1:
        shape = tuple(tensor.shape)
        raise AudioError(f"{name}: has shape {shape}; expected 1-D (samples,): average the channels first")
    if not len(tensor):
        raise AudioError(f"{name}: holds no samples; expected speech")
    if not tensor.is_floating_point():
        raise AudioError(
            f"{name}: holds {str(tensor.dtype).removeprefix('torch.')}; expected floats between -1 and 1: "
            "divide 16-bit integers by 32768"
        )
    if longest and len(tensor) > longest.samples:
        raise _too_long(name, longest, f"{len(tensor) / SAMPLE_RATE:.4g} s, ")
    tensor = tensor.to(torch.float32)
    _check_samples(tensor.cpu().numpy(), SAMPLE_RATE, name)
    return tensor


def _check_header(audio: Decoded, name: str, longest: Longest | None) -> None:
    # One sample more: resampling rounds.
    if longest and audio.frames and audio.frames * SAMPLE_RATE > (longest.samples + 1) * audio.rate:
        raise _too_long(name, longest, f"{audio.frames / audio.rate:.4g} s, ")


def _too_long(name: str, longest: Longest, lasts: str = "") -> TooLongError:
    return TooLongError(f"{name}: lasts {lasts}more than the {longest.seconds:.4g} s that {longest.why}")


def _as_it_is(samples: np.ndarray, *, last: bool) -> np.ndarray:
    return samples


def _check_samples(samples: np.ndarray, rate: int, name: str, *, start: int = 0) -> None:
    usable = (np.abs(samples) <= _LOUDEST).reshape(len(samples), -1).all(axis=1)
    if not usable.all():
        first = int(usable.argmin())
        what = f"samples beyond {_LOUDEST:g}" if np.isfinite(samples[first]).all() else "NaN or infinite samples"
        raise AudioError(f"{name}: carries {what}, the first at {(start + first) / rate:.3f} s; mend or remove it")
