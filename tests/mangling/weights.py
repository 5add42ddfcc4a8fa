"""Mangled weight files, mission files and encoder folders, made of whole ones; all seeded.

Each generator writes `count` of them and yields (path, what was done to it), one by one. What would run code leaves
`<folder>/sprung` behind; nothing may. Reading one gives a UserError or the whole thing, in little memory and time.
"""

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

SPRUNG = "sprung"
Tensors = dict[str, Any]
Made = Iterator[tuple[Path, str]]

# Values that no field of a configuration expects.
ODD: list[Any] = [
    None,
    -1,
    0,
    1,
    10**6,
    10**12,
    1e308,
    float("nan"),
    "",
    "x" * 300,
    "\x1b[2J",
    [],
    [[]],
    {},
    True,
    [0] * 7,
]


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


class Bomb:
    """Unpickled, it asks for 100 GB."""

    def __reduce__(self) -> tuple:
        return bytearray, (10**11,)


# --- bytes ---


def cut(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(len(content))])


def flip(path: Path, rng: np.random.Generator) -> None:
    """Bits anywhere, half of the time near the ends, where headers and directories are."""
    content = bytearray(path.read_bytes())
    near = min(len(content), 4096)
    for _ in range(rng.integers(1, 60)):
        place = rng.integers(len(content)) if rng.random() < 0.5 else rng.integers(-near, near)
        content[place] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def insert(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    place = rng.integers(len(content))
    path.write_bytes(content[:place] + rng.bytes(rng.integers(1, 5000)) + content[place + rng.integers(0, 5000) :])


def noise(path: Path, rng: np.random.Generator) -> None:
    start = [b"", b"PK\x03\x04", b"\x80\x02", struct.pack("<Q", 10**15), struct.pack("<Q", 64) + b"{"][rng.integers(5)]
    path.write_bytes(start + rng.bytes(rng.integers(0, 5000)))


def _packed_again(path: Path, change: Callable[[str, bytes], bytes], method: int, **more: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    top = next(iter(parts)).partition("/")[0]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))
        for name, content in more.items():
            archive.writestr(f"{top}/{name}", content)


def deflated(path: Path, rng: np.random.Generator) -> None:
    _packed_again(path, lambda name, content: content, zipfile.ZIP_DEFLATED)


def bomb(path: Path, rng: np.random.Generator) -> None:
    _packed_again(path, lambda name, content: content, zipfile.ZIP_DEFLATED, bomb=bytes(200_000_000))


def shorter_part(path: Path, rng: np.random.Generator) -> None:
    """Parts of the archive that hold less than the tensors claim."""
    _packed_again(path, lambda name, x: x[: len(x) // 2] if "/data/" in name else x, zipfile.ZIP_STORED)


def changed_pickle(path: Path, rng: np.random.Generator) -> None:
    """Bits of the description only: names, shapes, strides, offsets."""

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        mangled = bytearray(content)
        for _ in range(rng.integers(1, 6)):
            mangled[rng.integers(len(mangled))] ^= 1 << rng.integers(8)
        return bytes(mangled)

    _packed_again(path, change, zipfile.ZIP_STORED)


BYTES = (cut, flip, insert, noise, deflated, bomb, shorter_part, changed_pickle)


# --- tensors ---


def _mangled_tensors(tensors: Tensors, marker: Path, rng: np.random.Generator) -> tuple[Any, str]:
    """Another content for torch.save, and what it is."""
    name = list(tensors)[rng.integers(len(tensors))]
    x = tensors[name]
    layer = ["99999999", "9" * 5000, "-1", "٣", "1e3", "", "0.0"][rng.integers(7)]
    kinds: dict[str, Callable[[], Any]] = {
        "trap": lambda: tensors | {name: Trap(marker)},
        "trap-alone": lambda: Trap(marker),
        "bomb": lambda: tensors | {"bomb": Bomb()},
        "nan": lambda: tensors | {name: torch.full_like(x, [torch.nan, torch.inf, -torch.inf][rng.integers(3)])},
        "stride-0": lambda: tensors | {name: torch.zeros(1).expand(10**6, 10**6)},
        "stride-0-everywhere": lambda: {key: torch.zeros(1).expand(*y.shape[:-1], 10**8) for key, y in tensors.items()},
        "same-numbers": lambda: {key: torch.zeros(1, dtype=y.dtype).expand(y.shape) for key, y in tensors.items()},
        "transposed": lambda: {key: y.mT.contiguous().mT if y.dim() > 1 else y for key, y in tensors.items()},
        "layer": lambda: tensors | {f"{'language_model.' * rng.integers(2)}blocks.{layer}.att.time_state": x},
        "no-numbers": lambda: tensors | {name: torch.zeros(0)},
        "scalar": lambda: tensors | {name: torch.zeros(())},
        "long-shape": lambda: tensors | {name: torch.zeros([1] * 60)},
        "another-shape": lambda: tensors | {name: torch.zeros(list(rng.permutation([*x.shape, 3])))},
        "flat": lambda: tensors | {name: x.flatten()},
        "int": lambda: {key: y.int() for key, y in tensors.items()},
        "bool": lambda: tensors | {name: x > 0},
        "complex": lambda: tensors | {name: x.to(torch.complex64)},
        "float8": lambda: {key: y.to(torch.float8_e4m3fn) for key, y in tensors.items()},
        "double": lambda: {key: y.double() for key, y in tensors.items()},
        "quantised": lambda: tensors | {name: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)},
        "sparse": lambda: tensors | {name: x.to_sparse()},
        "meta": lambda: tensors | {name: torch.empty(10**9, 10**3, device="meta")},
        "without": lambda: {key: y for key, y in tensors.items() if key != name},
        "escapes": lambda: tensors | {"\x1b]0;title\x07\x1b[2J\n\x9b": x},
        "long-name": lambda: tensors | {"x" * 10**6: x},
        "many-names": lambda: tensors | {f"blocks.0.x{i}": torch.zeros(1) for i in range(10_000)},
        "many-layers": lambda: tensors | {f"blocks.{i}.ln1.weight": torch.zeros(1) for i in range(3_000)},
        "no-text-as-name": lambda: tensors | {3: x},
        "list": lambda: list(tensors.values()),
        "nested": lambda: {"state_dict": tensors},
        "itself": _itself,
        "deep": lambda: _deep(5_000),
        "empty": dict,
        "parameter": lambda: {key: torch.nn.Parameter(y) if y.is_floating_point() else y for key, y in tensors.items()},
    }
    kind = list(kinds)[rng.integers(len(kinds))]
    return kinds[kind](), kind


def _itself() -> dict:
    content: dict = {}
    content["itself"] = content
    return content


def _deep(levels: int) -> list:
    content: list = []
    for _ in range(levels):
        content = [content]
    return content


def _write_torch(path: Path, content: Any, rng: np.random.Generator) -> None:
    try:
        torch.save(content, path, _use_new_zipfile_serialization=bool(rng.random() < 0.8))
    except (RecursionError, RuntimeError, NotImplementedError):  # it is too much for torch.save
        path.write_bytes(pickle.dumps([], protocol=2))


def _mangled(path: Path, tensors: Tensors, marker: Path, rng: np.random.Generator) -> str:
    """Writes one mangled file of torch.save."""
    if rng.random() < 0.6:
        content, kind = _mangled_tensors(tensors, marker, rng)
        _write_torch(path, content, rng)
        return kind
    torch.save(tensors, path)
    how = BYTES[rng.integers(len(BYTES))]
    how(path, rng)
    return how.__name__


# --- what is read ---


def mangled_models(whole: Path, folder: Path, rng: np.random.Generator, count: int) -> Made:
    """Files of a language model."""
    tensors = torch.load(whole, weights_only=True)
    for i in range(count):
        if rng.random() < 0.8:
            path = folder / f"model-{i}.pth"
            yield path, _mangled(path, tensors, folder / SPRUNG, rng)
        else:
            path = folder / f"model-{i}.safetensors"
            save_file(tensors, path)
            how = (cut, flip, insert, noise)[rng.integers(4)]
            how(path, rng)
            yield path, f"safetensors-{how.__name__}"


def mangled_missions(whole: Path, folder: Path, rng: np.random.Generator, count: int) -> Made:
    """Mission files, each with its JSON; a tenth are states alone."""
    tensors = torch.load(whole, weights_only=True)
    info = json.loads(whole.with_suffix(".json").read_text()) | {"labels": ["a", "b"]}
    for i in range(count):
        path = folder / f"mission-{i}.pth"
        beside = path.with_suffix(".json")
        beside.write_text(json.dumps(info))
        torch.save(tensors, path)
        what = rng.random()
        if what < 0.1:
            states = {name[15:]: x for name, x in tensors.items() if name.startswith("language_model.")}
            kind = "states-" + _mangled(path, states, folder / SPRUNG, rng)
        elif what < 0.6:
            kind = _mangled(path, tensors, folder / SPRUNG, rng)
        elif what < 0.8:
            kind = _odd_value(info | {"mission": ("transcribe", "label")[rng.integers(2)]}, beside, rng)
        else:
            how = (cut, flip, insert, noise)[rng.integers(4)]
            how(beside, rng)
            kind = f"json-{how.__name__}"
        yield path, kind


def _odd_value(settings: dict[str, Any], path: Path, rng: np.random.Generator) -> str:
    """A JSON file with an odd value somewhere, or of another form."""
    if rng.random() < 0.15:
        path.write_text(["[]", "3", "null", '"a"', "[" * 100_000, "{}", '{"a": 1e999}'][rng.integers(7)])
        return "json-form"
    name, value = list(settings)[rng.integers(len(settings))], ODD[rng.integers(len(ODD))]
    path.write_text(json.dumps(settings | {name: value}))
    return f"json-{name}-{str(value)[:20]!r}"


def mangled_encoders(whole: Path, folder: Path, rng: np.random.Generator, count: int) -> Made:
    """Folders of an encoder."""
    tensors = load_file(whole / "model.safetensors")
    for i in range(count):
        path = folder / f"encoder-{i}"
        shutil.copytree(whole, path)
        what = rng.random()
        if what < 0.35:
            (path / "model.safetensors").unlink()
            kind = _mangled(path / "pytorch_model.bin", tensors, folder / SPRUNG, rng)
        elif what < 0.5:
            how = (cut, flip, insert, noise)[rng.integers(4)]
            how(path / "model.safetensors", rng)
            kind = f"safetensors-{how.__name__}"
        elif what < 0.6:
            name = ("model.safetensors", "config.json", "preprocessor_config.json")[rng.integers(3)]
            (path / name).unlink()
            kind = f"without-{name}"
        else:
            config = path / ("config.json" if rng.random() < 0.75 else "preprocessor_config.json")
            if rng.random() < 0.8:
                kind = _odd_value(json.loads(config.read_text()), config, rng)
            else:
                how = (cut, flip, insert, noise)[rng.integers(4)]
                how(config, rng)
                kind = f"{config.stem}-{how.__name__}"
        yield path, kind
