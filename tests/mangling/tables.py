"""Mangled manifests, tables, transcripts and folders around a few valid recordings, for a fuzzer of `load_split`.

    for kind, path in mangled_tables(folder, random.Random(0), 200):
        load_split(None, data=str(path))        # or data_dir=, for a folder: rows, or a UserError

Every case is a function of the generator alone. What lies in `folder` beforehand is not touched; recordings a.wav,
b.wav, c.wav are written there once, and each case into a folder of its own.
"""

import contextlib
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile

AUDIO = ("a.wav", "b.wav", "c.wav")
TEXTS = ("one two", "Grüße, Welt", 'he said "no"', "a;b|c\td", "", "x\u2028y\u0085z", "日本語")
ODD = (
    *(None, True, -1, 0, 7, 10**400, 1e308, float("nan"), float("inf"), [], {}, ["a.wav"], {"path": "a.wav"}, ""),
    *(
        "\ud83d",
        "\udce9.wav",
        "nul\0.wav",
        "x" * 5000,
        "../" * 300 + "a.wav",
        "a.wav/b",
        ".",
        "/",
        "/dev/zero",
        "~root/x",
    ),
    *(
        "http://127.0.0.1/a.wav",
        "pipe.wav",
        "loop.wav",
        "folder.wav",
        "socket.wav",
        "\n",
        "\r",
        "\u2028",
        "-",
        "a.wav ",
    ),
)
KEYS = ("audio", "audio_filepath", "path", "wav", "file_name", "source", "target", "text", "sentence", "id", "duration")
NEWLINES = ("\n", "\r\n", "\r", "\u2028", "\u0085", "\x0b", "\0", "\n\n", "")


def mangled_tables(folder: Path, rng: random.Random, count: int) -> Iterator[tuple[str, Path]]:
    """`count` cases: (what was written, the file or folder to read)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(AUDIO):
        if not (folder / name).exists():
            soundfile.write(folder / name, np.sin(np.arange(1600) * (0.1 + 0.1 * number)) * 0.5, 16000)
    for number in range(count):
        kind, make = rng.choice(list(_MAKERS.items()))
        place = folder / f"case-{number}"
        place.mkdir()
        for name in AUDIO:
            (place / name).symlink_to(folder / name)
        yield kind, make(place, rng)


def _entries(rng: random.Random) -> list[dict]:
    entries = [
        {"audio": name, "text": rng.choice(TEXTS), "id": f"u{i}", "duration": 0.1} for i, name in enumerate(AUDIO)
    ]
    for entry in entries:
        if rng.random() < 0.4:
            entry[rng.choice(KEYS)] = rng.choice(ODD)
        if rng.random() < 0.1:
            del entry[rng.choice(list(entry))]
    return entries


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=True)


def _spoil(content: bytes, rng: random.Random) -> bytes:
    """Bit flips, a cut, bytes put in, a piece doubled; or nothing."""
    for _ in range(rng.choice((0, 0, 1, 3))):
        at = rng.randrange(len(content) + 1)
        how = rng.randrange(4)
        if how == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif how == 1:
            content = content[:at]
        elif how == 2:
            piece = rng.choice(
                (b'"', b"'", b",", b";", b"\t", b"|", b"[", b"{", b"}", b"\\", b"\0", b"\xff", b"\r", b"\xef\xbb\xbf")
            )
            content = content[:at] + piece * rng.choice((1, 2, 500)) + content[at:]
        else:
            content = content[:at] + content[at // 2 : at] + content[at:]
    return content


def _write(path: Path, text: str, rng: random.Random) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = rng.choice(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "latin-1"))
    path.write_bytes(_spoil(text.encode(encoding, "surrogateescape" if encoding == "utf-8" else "replace"), rng))
    return path


def _lines(place: Path, rng: random.Random) -> Path:
    text = (
        rng.choice(NEWLINES).join(map(_dumps, _entries(rng)))
        if rng.random() < 0.3
        else "\n".join(map(_dumps, _entries(rng)))
    )
    return _write(place / rng.choice(("train.jsonl", "train.json")), text, rng)


def _array(place: Path, rng: random.Random) -> Path:
    entries = _entries(rng) + rng.choice(([], [5], [None], [[1]], ["a.wav"]))
    return _write(place / "train.json", json.dumps(entries, indent=rng.choice((None, 1))), rng)


def _deep(place: Path, rng: random.Random) -> Path:
    opening = rng.choice(("[", '{"audio":', '{"audio": "a.wav", "text": "x", "more": ['))
    depth = rng.choice((10, 1000, 100_000))
    number = rng.choice(("1" * 5000, "-1e999", "1" * 400, '"x"'))
    return _write(place / "deep.json", opening * depth + rng.choice(("", "]" * depth, "}" * depth, number)), rng)


def _table(place: Path, rng: random.Random) -> Path:
    separator = rng.choice((",", ";", "\t", "|"))
    head = rng.choice((["file_name", "text"], ["id", "path", "sentence", "client_id"], ["text", "wav", "duration"], []))
    values = {
        "file_name": AUDIO,
        "path": AUDIO,
        "wav": AUDIO,
        "id": ("u", "v"),
        "client_id": ("s",),
        "duration": ("0.1", "x", "-1", "9" * 400),
    }
    rows = [head] if head else []
    for _ in range(rng.randrange(8)):
        row = [rng.choice(values.get(name, TEXTS)) for name in head or ("text", "text")]
        row = [
            cell if rng.random() < 0.7 else '"' + cell.replace('"', rng.choice(('"', '""'))) + rng.choice(('"', ""))
            for cell in row
        ]
        rows.append(row + [rng.choice(TEXTS)] * rng.choice((0, 0, 0, 1)))
    name = rng.choice(("metadata.csv", "metadata.tsv", "train.tsv", "train.csv"))
    path = _write(place / name, rng.choice(NEWLINES[:3]).join(separator.join(row) for row in rows), rng)
    return place if name.startswith("metadata") and rng.random() < 0.5 else path


def _librispeech(place: Path, rng: random.Random) -> Path:
    chapter = place / "corpus" / "1" / "2"
    lines = [f"1-2-{i:04}{rng.choice((' ', chr(9), '', '  ', chr(160)))}{rng.choice(TEXTS)}" for i in range(4)]
    _write(chapter / "1-2.trans.txt", rng.choice(NEWLINES).join(lines), rng)
    for i in range(rng.randrange(5)):
        (chapter / f"1-2-{i:04}{rng.choice(('.flac', '.wav', '.mp4', ''))}").symlink_to(
            place.parent / rng.choice(AUDIO)
        )
    if rng.random() < 0.3:
        (place / "corpus" / "__MACOSX" / "1").mkdir(parents=True)
        (place / "corpus" / "__MACOSX" / "1" / "._1-2.trans.txt").write_bytes(b"\0\5\x16\7")
    if rng.random() < 0.3:
        os.mkfifo(chapter / rng.choice(("1-3.trans.txt", "1-2-0009.flac", "notes")))
    return place / "corpus"


def _folder(place: Path, rng: random.Random) -> Path:
    """Odd things beside the recordings, and a manifest that names them."""
    (place / "loop.wav").symlink_to("loop.wav")
    (place / "round").symlink_to(".")
    (place / "folder.wav").mkdir()
    os.mkfifo(place / "pipe.wav")
    with socket.socket(socket.AF_UNIX) as unix, contextlib.suppress(OSError):  # a path too long for a socket
        unix.bind(str(place / "socket.wav"))
    open(os.fsencode(place) + b"/caf\xe9.wav", "wb").close()
    names = [*AUDIO, *(x for x in ODD if isinstance(x, str) and x), "caf\udce9.wav", "empty.wav"]
    (place / "empty.wav").touch()
    rng.shuffle(names)
    lines = [_dumps({"audio": name, "text": "x"}) for name in names if "\ud83d" not in name or rng.random() < 0.2]
    path = place / "train.jsonl"
    path.write_text("\n".join(lines))
    return path


_MAKERS: dict[str, Callable[[Path, random.Random], Path]] = {
    "lines": _lines,
    "array": _array,
    "deep": _deep,
    "table": _table,
    "librispeech": _librispeech,
    "folder": _folder,
}
