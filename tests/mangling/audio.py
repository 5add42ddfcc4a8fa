"""Mangled audio, seeded: reading it gives samples or an AudioError, in little memory and time."""

import io
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile

KINDS = [  # container, subtype, suffix
    *(
        ("WAV", width, ".wav")
        for width in ("PCM_U8", "PCM_16", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "GSM610")
    ),
    *(("FLAC", width, ".flac") for width in ("PCM_16", "PCM_24")),
    *(("OGG", codec, ".ogg") for codec in ("VORBIS", "OPUS")),
    ("MP3", "MPEG_LAYER_III", ".mp3"),
    *((container, "PCM_16", f".{container.lower()}") for container in ("AIFF", "AU", "W64", "RF64", "CAF")),
    ("CAF", "ALAC_16", ".caf"),
]
PLAYLISTS = [
    "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{0}\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10,\nfile:///dev/zero\n",
    "ffconcat version 1.0\nfile '{0}'\nfile /dev/zero\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="dynamic" minimumUpdatePeriod="PT1S"></MPD>',
    "[playlist]\nFile1={0}\nNumberOfEntries=1\n",
]
SIZES = (0, 1, 2, 8, 36, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2_000_000_000, 2**20)


def mangled_audio(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Path]:
    """Paths, `count` of them, in the folder (which it makes), of files and of what is none, one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    manglers = (_cut, _flip, _splice, _lie, _lie, _lie, _loud, _playlist, _other_suffix, _nonsense, _special)
    for number in range(count):
        yield manglers[int(rng.integers(len(manglers)))](folder, f"{number:05}", rng)


def _sound(rng: np.random.Generator) -> tuple[bytearray, str]:
    container, width, suffix = KINDS[int(rng.integers(len(KINDS)))]
    rate = int(rng.choice([8_000, 16_000])) if container in ("OGG", "MP3") else int(rng.choice([8_000, 16_000, 44_100]))
    channels = 1 if width in ("GSM610", "IMA_ADPCM") else int(rng.choice([1, 1, 2]))
    samples = rng.uniform(-0.5, 0.5, (int(rng.integers(1, rate)), channels)) * rng.choice([0.0, 0.01, 1.0])
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=width)
    return bytearray(file.getvalue()), suffix


def _written(folder: Path, name: str, content: bytes, suffix: str) -> Path:
    path = folder / f"{name}{suffix}"
    path.write_bytes(content)
    return path


def _cut(folder: Path, name: str, rng: np.random.Generator) -> Path:
    data, suffix = _sound(rng)
    return _written(folder, name, data[: int(rng.integers(len(data)))], suffix)


def _flip(folder: Path, name: str, rng: np.random.Generator) -> Path:
    data, suffix = _sound(rng)
    reach = int(rng.choice([64, 256, len(data)]))  # headers more than the rest
    for place in rng.integers(min(reach, len(data)), size=int(rng.integers(1, 20))):
        data[place] ^= 1 << int(rng.integers(8))
    return _written(folder, name, data, suffix)


def _splice(folder: Path, name: str, rng: np.random.Generator) -> Path:
    (data, suffix), (other, _) = _sound(rng), _sound(rng)
    return _written(folder, name, data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :], suffix)


def _lie(folder: Path, name: str, rng: np.random.Generator) -> Path:
    """A number of the header, of two, four or eight bytes, becomes an extreme one."""
    data, suffix = _sound(rng)
    tags = [
        data.find(tag)
        for tag in (b"data", b"fmt ", b"RIFF", b"SSND", b"COMM", b"ds64", b"Xing", b"Info", b"fLaC", b"desc")
    ]
    places = [tag + 4 + int(rng.integers(0, 24)) for tag in tags if tag >= 0] + [
        int(rng.integers(0, min(128, len(data))))
    ]
    place, value = int(rng.choice(places)), int(rng.choice(SIZES))
    form = str(rng.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"]))
    number = struct.pack(form, value % 256 ** struct.calcsize(form))
    data[place : place + len(number)] = number
    return _written(folder, name, data, suffix)


def _loud(folder: Path, name: str, rng: np.random.Generator) -> Path:
    samples = rng.uniform(-1, 1, (int(rng.integers(1, 20_000)), 2)).astype(np.float32)
    worst = rng.choice([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e20, 1e-42], size=3)
    samples[rng.integers(len(samples), size=3)] = worst[:, None]
    file = io.BytesIO()
    soundfile.write(
        file, samples, int(rng.choice([1, 7, 1_000, 16_000, 768_000, 2**31 - 1])), format="WAV", subtype="FLOAT"
    )
    return _written(folder, name, file.getvalue(), ".wav")


def _playlist(folder: Path, name: str, rng: np.random.Generator) -> Path:
    text = PLAYLISTS[int(rng.integers(len(PLAYLISTS)))].format(folder / "00000.wav")
    return _written(folder, name, text.encode(), str(rng.choice([".mp3", ".m4a", ".m3u8", ".aac", ".wav", ".webm"])))


def _other_suffix(folder: Path, name: str, rng: np.random.Generator) -> Path:
    data, _ = _sound(rng)
    return _written(folder, name, data, str(rng.choice([".raw", ".m4a", ".mp3", ".wav", ".opus", ".aac", ""])))


def _nonsense(folder: Path, name: str, rng: np.random.Generator) -> Path:
    head = [
        b"",
        b"RIFF",
        b"OggS",
        b"fLaC",
        b"ID3\x04",
        b"FORM",
        b".snd",
        b"\xff\xfb\x90",
        b"\0\0\0 ftypM4A ",
        b"\x1aE\xdf\xa3",
    ]
    return _written(folder, name, head[int(rng.integers(len(head)))] + rng.bytes(int(rng.integers(5_000))), ".mp3")


def _special(folder: Path, name: str, rng: np.random.Generator) -> Path:
    path = folder / f"{name}.wav"
    make: list[Callable[[], object]] = [
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to(folder / "nowhere"),
        lambda: path.mkdir(),
        lambda: path.write_bytes(b""),
        lambda: _bind(path),
    ]
    odd = [
        folder / f"{name}\0.wav",
        folder / (name + "x" * 300 + ".wav"),
        Path(os.fsdecode(os.fsencode(path) + b"\xff")),
    ]
    choice = int(rng.integers(len(make) + len(odd)))
    if choice >= len(make):
        return odd[choice - len(make)]
    make[choice]()
    return path


def _bind(path: Path) -> None:
    """The path of a socket has at most some hundred bytes."""
    with socket.socket(socket.AF_UNIX) as made:
        before = Path.cwd()
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.chdir(before)
