"""Encoded audio -> blocks of its frames, by libsndfile, or by ffmpeg where libsndfile doesn't know the format.

Nothing that a file says of itself is believed without a limit: it may be no file at all, promise a length or a rate
that decides an allocation, or be a playlist that names other files.
"""

import ctypes
import io
import logging
import mmap
import os
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import soundfile

from rwkv_speech.errors import UserError
from rwkv_speech.files import printable

Encoded = bytes | bytearray | memoryview  # the content of an audio file, as Hugging Face datasets hand it out

RATES = 1_000, 768_000  # Hz, lowest and highest

_BLOCK = 1 << 20  # samples, over all channels, to decode at a time
_NO_LENGTH = 1 << 48  # frames; libsndfile puts 2**63 - 1 where a FLAC stream leaves its length open
_STREAMS = {"MP3", "OGG"}  # promise no length; what libsndfile says of it may be a guess

# Frames that a byte can stand for, at most: FLAC has 65,535 in the 12 bytes of its smallest frame, Opus 5,760 in 2
# with the page's, MP3 576 in 24 (8 kbit/s at 24 kHz). Others stay far below: ALAC some hundreds, ADPCM 4.
_FRAMES_PER_BYTE = {"FLAC": 6_000, "OGG": 6_000, "MP3": 100}
_FRAMES_PER_BYTE_ELSE = 1_000

# What writers that cannot seek back, or were killed, leave where the size of a WAV file's samples belongs.
_UNSET = (0, 36)  # bytes
_OPEN = 2_000_000_000  # and from here on
_CHUNK_NAME = re.compile(rb"[\w ]{4}")

# libsndfile reports a chunk that is longer than its file in its log only, e.g. "data : 320000 (should be 159978)".
_SHORT_CHUNK = re.compile(r"\b(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)")

# What ffmpeg may take a file for: containers, and streams that are audio from their first byte. No playlists or
# scripts, which name other files and addresses, and need not end; no images, no devices.
_DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,matroska,mlp,mov,mp3,mpc,mpc8,mpeg,mpegts,nut,ogg,"
    "oma,rm,shn,sox,tak,truehd,tta,voc,w64,wav,wv,xwma"
)
_AU_HEADER = struct.Struct(">4s5I")  # ".snd", where the samples begin, their size, encoding, rate, channels
_PATIENCE, _PATIENCE_PER_MB = 60.0, 20.0  # s that ffmpeg gets for a file: hundreds of times what it takes
_ADDRESS = re.compile(r"\[[^]]* @ 0x[0-9a-f]+\] ")  # of what says something, before it
_PR_SET_PDEATHSIG = 1

log = logging.getLogger("rwkv_speech")


class AudioError(UserError):
    """Audio that cannot be used: one line that names the file and says what is wrong with it."""


@dataclass(frozen=True)
class Decoded:
    """What is inside of encoded audio.

    rate: in Hz, within RATES.
    first: the place of the first frame in its file.
    frames: as the header has it; None where it has no number, or a guess.
    estimate: the same, or the guess.
    blocks: (frames, channels) float32 each, at least one frame.
    blocks_from: in place of `blocks`: those from a frame on, no more than so many frames each; None where there is no
        way but from the beginning.
    """

    rate: int
    frames: int | None
    estimate: int | None
    blocks: Iterator[np.ndarray]
    blocks_from: Callable[[int, int | None], Iterator[np.ndarray]] | None = None
    first: int = 0


def describe(source: str | Path | Encoded) -> str:
    """What to call encoded audio that has no other name."""
    return f"audio of {len(source)} bytes" if isinstance(source, Encoded) else printable(source)


def open_file(path: str | Path, name: str) -> BinaryIO:
    """Opens a file, unbuffered, if it is one, whatever else the path leads to; it is not empty.

    Raises:
        AudioError: by name.
    """
    try:
        os.fspath(path).encode()
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for somebody to write into it
    except FileNotFoundError:
        raise AudioError(f"{name}: no such file; expected an audio file") from None
    except UnicodeEncodeError:
        raise AudioError(f"{name}: its name is not UTF-8; rename it") from None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: cannot be opened ({problem}); expected an audio file") from None
    found = os.fstat(number)
    if stat.S_ISREG(found.st_mode) and found.st_size:
        return open(number, "rb", buffering=0)
    os.close(number)
    kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device or a pipe"
    problem = "empty (0 bytes)" if stat.S_ISREG(found.st_mode) else kind
    raise AudioError(f"{name}: is {problem}; expected an audio file")


@contextmanager
def decoding(source: str | Path | Encoded, name: str) -> Iterator[Decoded]:
    """Opens encoded audio; what is wrong with its samples is found when its blocks are read.

    Raises:
        AudioError: it can't be read, or its header says what can't be.
    """
    with ExitStack() as stack:
        try:
            audio = _by_libsndfile(source, name, stack)
        except _UnknownFormatError as error:
            audio = _by_ffmpeg(source, name, stack, reason=str(error))
        if not RATES[0] <= audio.rate <= RATES[1]:
            raise AudioError(f"{name}: has a sample rate of {audio.rate} Hz; expected 1 to 768 kHz")
        yield audio


# libsndfile


class _UnknownFormatError(Exception):
    """libsndfile does not know what this is."""


class _QuietSeek:
    """soundfile prints a traceback where libsndfile goes to a place that is not there, as damaged files have it do."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        with suppress(ValueError):
            super().seek(offset, whence)


class _Bytes(_QuietSeek, io.BytesIO):
    pass


class _Copy(_QuietSeek, mmap.mmap):
    """Of a file, that can be written to and takes no memory beyond that."""


def _block_frames(rate: int, channels: int) -> int:
    """To decode at a time: no more than a minute, in whose length resampling will not change a block's memory."""
    return max(1, min(_BLOCK // channels, 60 * rate))


def _by_libsndfile(source: str | Path | Encoded, name: str, stack: ExitStack) -> Decoded:
    if isinstance(source, Encoded):
        if not len(source):
            raise AudioError(f"{name}: is empty (0 bytes); expected an audio file")
        file: Any = _Bytes(source)
    else:
        file = stack.enter_context(open_file(source, name))
    file.seek(0, os.SEEK_END)
    size = file.tell()
    place = _unset_size(file)
    file.seek(0)
    if place is not None:
        if isinstance(file, _Bytes):
            content: Any = file.getbuffer()
        else:
            content = file = stack.enter_context(_Copy(file.fileno(), 0, access=mmap.ACCESS_COPY))
        content[place : place + 4] = min(size - place - 4, 0xFFFFFFFF).to_bytes(4, "little")
    try:
        by = file if isinstance(file, _QuietSeek) else file.fileno()
        sound = stack.enter_context(soundfile.SoundFile(by, closefd=False))
    except soundfile.LibsndfileError as error:
        raise _UnknownFormatError(error.error_string.strip().rstrip(".")) from error
    frames, rate = sound.frames, sound.samplerate
    if frames >= _NO_LENGTH:  # soundfile loses the last block of such a file
        raise _UnknownFormatError("its header does not say how long it is")
    if frames > size * _FRAMES_PER_BYTE.get(sound.format, _FRAMES_PER_BYTE_ELSE):
        raise AudioError(f"{name}: claims {frames / max(rate, 1) / 3600:,.1f} hours, which its {size} bytes can't hold")
    if place is not None or any(int(stated) >= _OPEN for stated, _ in _SHORT_CHUNK.findall(sound.extra_info)):
        log.warning("%s: its header was never closed; going on with the %.2f s there are", name, frames / max(rate, 1))
    stated = None if sound.format in _STREAMS else frames
    return Decoded(rate, stated, frames, _sound_blocks(sound, name), partial(_sound_blocks, sound, name))


def _unset_size(file: BinaryIO) -> int | None:
    """Where a WAV file says how many bytes its samples take, if that was never filled in."""
    file.seek(0)
    riff, _, wave = (file.read(4) for _ in range(3))
    if (riff, wave) != (b"RIFF", b"WAVE"):
        return None
    place = 12
    for _ in range(100):  # chunks; a file of nothing else ends here
        chunk, size = _chunk(file, place)
        if chunk == b"data":
            behind, rest = _chunk(file, place + 8 + size)
            is_chunk = _CHUNK_NAME.fullmatch(behind) and rest < _OPEN
            return place + 4 if size in _UNSET and behind and not is_chunk else None
        place += 8 + size + size % 2
    return None


def _chunk(file: BinaryIO, place: int) -> tuple[bytes, int]:
    """Name and size of what begins there."""
    file.seek(place)
    return file.read(4), int.from_bytes(file.read(4), "little")


def _sound_blocks(
    file: soundfile.SoundFile, name: str, first: int = 0, most: int | None = None
) -> Iterator[np.ndarray]:
    """From the first frame on, at most so many at a time. AudioError where there are fewer than the header promises."""
    promised = file.frames
    for stated, found in _SHORT_CHUNK.findall(file.extra_info):
        if int(found) < int(stated) < _OPEN:
            promised = max(promised, round(file.frames * int(stated) / max(int(found), 1)))
    decoded, size = first, min(most or _BLOCK, _block_frames(file.samplerate, file.channels))
    try:
        if first:
            file.seek(first)
        # Not file.blocks(): that one makes up for missing frames with whatever its buffer holds.
        while len(block := file.read(size, dtype="float32", always_2d=True)):
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


# ffmpeg


def _by_ffmpeg(source: str | Path | Encoded, name: str, stack: ExitStack, *, reason: str) -> Decoded:
    """The first audio stream of a file; what is not asked for is not decoded."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise AudioError(
            f"{name}: cannot be read as audio ({reason}); expected FLAC, WAV, MP3 or Ogg/Opus: "
            "if it is of another format, install ffmpeg"
        )
    if isinstance(source, Encoded):
        copy = tempfile.NamedTemporaryFile()  # noqa: SIM115 - the stack closes it; no pipe: MP4 is read from its end
        stack.enter_context(copy)
        copy.write(source)
        copy.flush()
        source = copy.name
    try:
        process = stack.enter_context(_FFmpeg(ffmpeg, os.path.abspath(source), name))
    except OSError as error:
        raise AudioError(f"{name}: ffmpeg cannot be started for it ({error.strerror})") from error
    header = process.read(_AU_HEADER.size)
    if len(header) < _AU_HEADER.size:
        process.fail()
    _, begin, _, _, rate, channels = _AU_HEADER.unpack(header)
    process.read(begin - len(header))
    return Decoded(rate, None, None, process.blocks(rate, channels))


class _FFmpeg:
    """A process that decodes a file into a pipe; it ends with the `with` block around it, or with this process."""

    def __init__(self, ffmpeg: str, path: str, name: str) -> None:
        self.name, self.source = name, f"file:{path}"
        self.left = _PATIENCE + _PATIENCE_PER_MB * os.path.getsize(path) / 1e6  # s to wait for it, in all reads
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        source = ["-protocol_whitelist", "file", "-format_whitelist", _DEMUXERS, "-i", self.source]
        samples = ["-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
        self.process = subprocess.Popen(
            [ffmpeg, "-nostdin", "-v", "error", *source, *samples],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            bufsize=0,
            preexec_fn=_end_with_parent,
        )
        self.pipe = select.poll()
        self.pipe.register(self.process.stdout, select.POLLIN)

    def __enter__(self) -> "_FFmpeg":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer where these are all.

        Raises:
            AudioError: it takes longer than any file of this size should.
        """
        pieces = []
        while size:
            start = time.monotonic()
            ready = self.pipe.poll(max(0.0, self.left) * 1000)
            self.left -= time.monotonic() - start
            if not ready:
                self.fail()
            piece = os.read(self.process.stdout.fileno(), size)
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def blocks(self, rate: int, channels: int) -> Iterator[np.ndarray]:
        frame = 4 * channels  # bytes
        while len(block := self.read(frame * _block_frames(rate, channels))) >= frame:
            samples = np.frombuffer(block, ">f4", len(block) // frame * channels)
            yield samples.astype(np.float32).reshape(-1, channels)
        if self._status() != 0:
            self.fail()

    def fail(self) -> NoReturn:
        status = self._status()
        self.errors.seek(0)
        said = self.errors.read(10_000).decode(errors="replace").strip()
        # The same of the same file: without addresses, and the name of a copy.
        said = _ADDRESS.sub("", said).replace(f"{self.source}: ", "")
        reason = (said.splitlines() or ["no audio found"])[0] if status is not None else "it does not come to an end"
        raise AudioError(
            f"{self.name}: cannot be read as audio, by ffmpeg neither ({printable(reason)}); expected an audio file"
        )

    def _status(self) -> int | None:
        """Its exit status; None where it doesn't end in time."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(max(0.0, self.left))
        return None


_libc = ctypes.CDLL(None)  # found here: between fork and exec little may be done


def _end_with_parent() -> None:
    """Also where that is killed; without Linux, ffmpeg only ends when it next writes into the pipe."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
