"""Audio of any rate, width and number of channels -> one channel of float32 at 16 kHz.

What becomes of unusual input (a transcript, or one `AudioError` that names the file):

    one sample, silence         read as they are
    no samples, 0 bytes         error
    NaN or infinite samples     error, with the time of the first one
    cut off (FLAC, WAV, ...)    error, with how much of the promised length is there
    cut off (MP3, Ogg)          read as far as it goes, with a warning: these are streams and promise no length
    not audio                   error; formats unknown to libsndfile go through ffmpeg where it is installed
"""

import io
import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from rwkv_speech.errors import UserError

SAMPLE_RATE = 16_000  # Hz, what every supported encoder was trained on

Encoded = bytes | bytearray | memoryview  # the content of an audio file, as Hugging Face datasets hand it out

_BLOCK = 1 << 20  # frames decoded at a time: a header that lies about the length must not decide an allocation
_NO_LENGTH = 1 << 48  # frames; libsndfile puts 2**63 - 1 where a FLAC stream leaves its length open
_OPEN_CHUNK = 0x7FFF0000  # bytes; writers that cannot seek back put sizes from here on where the real one belongs
_STREAMS = {"MP3", "OGG"}

# libsndfile reports a chunk that is longer than its file in its log only, e.g. "data : 320000 (should be 159978)".
_SHORT_CHUNK = re.compile(r"\b(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)")

log = logging.getLogger("rwkv_speech")


class AudioError(UserError):
    """Audio that cannot be used: one line that names the file and says what is wrong with it."""


def load_audio(source: str | Path | Encoded, *, name: str | None = None) -> Tensor:
    """Decode a file, average its channels, resample to 16 kHz.

    Args:
        source: a path, or the bytes of an encoded file (FLAC, WAV, MP3, Ogg/Opus, ...; see the table above).
        name: what to call the audio in errors; the path if left out.

    Returns:
        (samples,) float32 on the CPU, at least one sample. The level is left alone: full scale of integer
        formats is 1, and float formats may go beyond.

    Raises:
        AudioError: as the table at the top of this file says.
    """
    return torch.cat(list(audio_blocks(source, name=name)))


def audio_blocks(source: str | Path | Encoded, *, name: str | None = None) -> Iterator[Tensor]:
    """What `load_audio` gives, block by block: recordings of any length in the memory of a block.

    Yields:
        (samples,) float32 on the CPU, at least one sample each.

    Raises:
        AudioError: as `load_audio`, once reading comes to what is wrong.
    """
    name = name or _describe(source)
    with _opened(source, name) as file:
        rate = file.samplerate
        resample = soxr.ResampleStream(rate, SAMPLE_RATE, 1).resample_chunk if rate != SAMPLE_RATE else _as_it_is
        decoded = given = 0
        for block in _read(file, name):  # (frames, channels)
            _check_finite(block, rate, name, start=decoded)
            mono = block.mean(axis=1)
            decoded += len(block)
            samples = resample(mono, last=False)
            if len(samples):
                yield torch.from_numpy(samples)
                given += len(samples)
        if not decoded:
            raise AudioError(f"{name}: holds no samples; expected speech")
        rest = resample(mono[:0], last=True)
        if not given and not len(rest):
            rest = mono[:1]  # audio shorter than half an output sample resamples to nothing
        if len(rest):
            yield torch.from_numpy(rest)


def duration(source: str | Path | Encoded, *, name: str | None = None) -> float:
    """Length in seconds, by the header alone where it has one; an MP3 without a length tag gives an estimate.

    Raises:
        AudioError: the audio cannot be opened.
    """
    name = name or _describe(source)
    try:
        with _open(source, name) as file:
            if file.frames < _NO_LENGTH:
                return file.frames / file.samplerate
    except _UnknownFormatError:
        pass
    with _opened(source, name) as file:
        return sum(len(block) for block in _read(file, name)) / file.samplerate


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


def check_waveform(waveform: np.ndarray | Tensor | Sequence[float], name: str = "waveform") -> Tensor:
    """Audio given from Python: 1-D floats at 16 kHz, nothing guessed.

    Args:
        waveform: (samples,) of any floating-point type; its device is kept.
        name: what to call it in errors.

    Returns:
        (samples,) float32, detached.

    Raises:
        AudioError: not 1-D, not floating point (integer samples have no scale of their own), empty, or
            carrying NaN or infinite values.
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
    tensor = tensor.to(torch.float32)
    _check_finite(tensor.cpu().numpy(), SAMPLE_RATE, name)
    return tensor


class _UnknownFormatError(Exception):
    """libsndfile does not know what this is."""


def _describe(source: str | Path | Encoded) -> str:
    return f"audio of {len(source)} bytes" if isinstance(source, Encoded) else str(source)


def _open(source: str | Path | Encoded, name: str) -> soundfile.SoundFile:
    if isinstance(source, Encoded):
        empty = not len(source)
        file = io.BytesIO(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise AudioError(f"{name}: {'is a folder' if path.is_dir() else 'no such file'}; expected an audio file")
        empty = not path.stat().st_size
        file = path
    if empty:
        raise AudioError(f"{name}: is empty (0 bytes); expected an audio file")
    try:
        return soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        raise _UnknownFormatError(error.error_string.strip().rstrip(".")) from error
    except TypeError as error:  # soundfile takes the suffix .raw for samples without a header
        raise _UnknownFormatError("raw samples without a header") from error


@contextmanager
def _opened(source: str | Path | Encoded, name: str) -> Iterator[soundfile.SoundFile]:
    """The file as libsndfile reads it or, where that does not know the format, what ffmpeg makes of it."""
    try:
        file = _open(source, name)
        if file.frames >= _NO_LENGTH:  # soundfile loses the last block of such a file
            file.close()
            raise _UnknownFormatError("its header does not say how long it is")
    except _UnknownFormatError as error:
        reason = str(error)
    else:
        with file:
            yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        wav = _convert(source, name, Path(folder), reason=reason)
        with soundfile.SoundFile(wav) as file:
            yield file


def _read(file: soundfile.SoundFile, name: str) -> Iterator[np.ndarray]:
    """The frames of an open file, (frames, channels) float32; AudioError where it holds fewer than it promises."""
    promised = file.frames
    for stated, found in _SHORT_CHUNK.findall(file.extra_info):
        if int(found) < int(stated) < _OPEN_CHUNK:
            promised = max(promised, round(file.frames * int(stated) / max(int(found), 1)))
    decoded = 0
    try:
        # Not file.blocks(): that one makes up for missing frames with whatever its buffer holds.
        while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
            decoded += len(block)
            yield block
    except soundfile.LibsndfileError:
        decoded = max(decoded, file.tell())
    else:
        if decoded >= promised and "lacks an end-of-stream bit" not in file.extra_info:
            return
    seconds, whole = decoded / file.samplerate, promised / file.samplerate
    if file.format in _STREAMS and decoded:
        log.warning("%s: seems cut off; going on with the %.2f s that can be decoded", name, seconds)
        return
    raise AudioError(f"{name}: cut off or damaged: {seconds:.2f} of {whole:.2f} s can be decoded; fetch it again")


def _convert(source: str | Path | Encoded, name: str, folder: Path, *, reason: str) -> Path:
    """The first audio stream of a file that libsndfile cannot read, as a WAV file in the folder, by ffmpeg."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise AudioError(
            f"{name}: cannot be read as audio ({reason}); expected FLAC, WAV, MP3 or Ogg/Opus: "
            "if it is of another format, install ffmpeg"
        )
    path = Path(source).resolve() if not isinstance(source, Encoded) else folder / "audio"
    if isinstance(source, Encoded):
        path.write_bytes(source)  # not by a pipe: MP4 is read from its end
    wav = folder / "audio.wav"
    # A play list must not make ffmpeg open addresses on the network.
    limits = ["-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe"]
    output = ["-map", "0:a:0", "-c:a", "pcm_f32le", "-f", "wav", "-rf64", "auto", str(wav)]  # also beyond 4 GiB
    done = subprocess.run([ffmpeg, *limits, "-i", f"file:{path}", *output], capture_output=True, check=False)
    if done.returncode or not wav.exists():
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no audio found"]
        raise AudioError(f"{name}: cannot be read as audio, by ffmpeg neither ({lines[0]}); expected an audio file")
    return wav


def _as_it_is(samples: np.ndarray, *, last: bool) -> np.ndarray:
    return samples


def _check_finite(samples: np.ndarray, rate: int, name: str, *, start: int = 0) -> None:
    finite = np.isfinite(samples).reshape(len(samples), -1).all(axis=1)
    if not finite.all():
        seconds = (start + int(finite.argmin())) / rate
        raise AudioError(f"{name}: carries NaN or infinite samples, the first at {seconds:.3f} s; mend or remove it")
