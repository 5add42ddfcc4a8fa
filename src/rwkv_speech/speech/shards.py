"""Frames on disk, under keys of 16 bytes: data files read through memory maps, and indices that survive a kill.

- Every writer makes files of its own, `<id>.frames` and `<id>.index`, and only ever appends: any number of processes
  write into one folder without locks, which some cluster file systems lack.
- Data reaches the disk before the records that point to it. A record has a fixed size and its own checksum, so that
  whatever a killed writer leaves behind, half a record or data without one, is passed over.
- A frame is `width` halves (fp16), or one fp32 scale and `width` bytes (int8): x = scale * q, |q| <= 127, so the error
  is at most half the scale, max|x| / 254.
"""

import os
import secrets
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.files import writing

Storage = Literal["fp16", "int8"]

SHARD_BYTES = 1 << 30  # a data file grows no further, unless a single recording needs more

_RECORD = np.dtype(
    [
        ("key", "S16"),
        ("shard", "<u8"),  # names the data file
        ("offset", "<u8"),  # bytes
        ("frames", "<u4"),
        ("samples", "<u4"),  # of the recording, at 16 kHz
        ("data_sum", "<u4"),  # CRC-32 of the data
        ("sum", "<u4"),  # CRC-32 of the fields before
    ]
)
RECORD_BYTES = _RECORD.itemsize


class Shards:
    """The frames in a folder, as far as they were written when it was opened or last reloaded.

    folder: where the files lie.
    width: channels of a frame.
    storage: how frames are kept.
    """

    def __init__(self, folder: Path, *, width: int, storage: Storage) -> None:
        self.folder = folder
        self.width = width
        self.storage: Storage = storage
        self.frame_bytes = width + 4 if storage == "int8" else 2 * width
        self.reload()

    def reload(self) -> None:
        """Takes in what has been written meanwhile, by this process and others."""
        self._maps: dict[int, np.memmap] = {}
        # Indices first: the data of a record that is there is there too.
        indices = [_whole_records(path.read_bytes()) for path in sorted(self.folder.glob("*.index"))]
        records = np.concatenate([np.empty(0, _RECORD), *indices])
        shards, which = np.unique(records["shard"], return_inverse=True)
        sizes = np.array([self._size(int(shard)) for shard in shards], "<u8")
        ends = records["offset"] + records["frames"].astype("<u8") * np.uint64(self.frame_bytes)
        records = records[ends <= sizes[which]]
        self._records = records[np.argsort(records["key"], kind="stable")]
        self._keys = np.ascontiguousarray(self._records["key"])

    def __len__(self) -> int:
        """Keys that lead to frames."""
        return len(self._keys)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a memory map would be pickled with all that it maps

    def find(self, key: bytes) -> np.void | None:
        """The record of a key: its fields `frames` and `samples`, and what `read` needs."""
        i = int(np.searchsorted(self._keys, np.array(key, "S16")))
        if i == len(self._keys) or self._keys[i] != np.array(key, "S16"):
            return None
        return self._records[i]

    def read(self, record: np.void) -> Tensor:
        """The frames of a record: (frames, width), float16 or, from int8, float32.

        Raises:
            UserError: the data is not what was written.
        """
        shard, start = int(record["shard"]), int(record["offset"])
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._path(shard), np.uint8, "r")
        data = self._maps[shard][start : start + int(record["frames"]) * self.frame_bytes]
        if zlib.crc32(data) != record["data_sum"]:
            raise UserError(f"{self._path(shard)} is damaged; remove it and start again")
        return unpack(data, self.width, self.storage)

    def _size(self, shard: int) -> int:
        path = self._path(shard)
        return path.stat().st_size if path.exists() else 0

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:016x}.frames"


class ShardWriter:
    """Adds frames to shards, as a context; what was committed stays, whatever happens afterwards.

    A reader sees them after `Shards.reload`. Nothing is created before the first frames come.
    Every method raises UserError where the disk is full.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._data: BinaryIO | None = None
        self._index: BinaryIO | None = None
        self._pending: list[bytes] = []  # records whose data may not be on the disk yet

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        with suppress(OSError):  # of what is not committed, nothing counts
            self._close()

    def add(self, key: bytes, frames: Tensor, samples: int) -> np.void:
        """Writes the frames (F, width) of a recording of so many samples; `link` takes what comes back.

        Raises:
            ValueError: frames that can't be kept in this storage.
        """
        data = pack(frames, self._shards.storage)
        if self._data is not None and self._data.tell() + len(data) > SHARD_BYTES:
            self.commit()
            self._close()
        with writing(self._shards.folder):
            self._open()
            place = (self._shard, self._data.tell(), len(frames), samples, zlib.crc32(data))
            self._data.write(data)
        record = np.array((key, *place, 0), _RECORD)[()]
        self.link(key, record)
        return record

    def link(self, key: bytes, record: np.void) -> None:
        """Makes one more key lead to frames that are there."""
        raw = np.array((key, *record.item()[1:]), _RECORD).tobytes()[:-4]
        self._pending.append(raw + zlib.crc32(raw).to_bytes(4, "little"))

    def commit(self) -> None:
        """Brings everything to the disk, the data first."""
        if not self._pending:
            return
        with writing(self._shards.folder):
            self._open()
            _flush(self._data)
            self._index.write(b"".join(self._pending))
            _flush(self._index)
        self._pending.clear()

    def _open(self) -> None:
        if self._data is None:
            self._shards.folder.mkdir(parents=True, exist_ok=True)
            self._shard = secrets.randbits(64)
            path = self._shards._path(self._shard)
            self._data, self._index = path.open("xb"), path.with_suffix(".index").open("xb")

    def _close(self) -> None:
        for file in (self._data, self._index):
            if file is not None:
                file.close()
        self._data = self._index = None


def pack(frames: Tensor, storage: Storage) -> bytes:
    """(F, width) of any floating-point type -> the bytes of a data file.

    Raises:
        ValueError: frames that are not finite, or beyond the range of fp16.
    """
    frames = frames.detach().float().cpu()
    if not frames.isfinite().all():
        raise ValueError("not finite")
    if storage == "fp16":
        halves = frames.half()
        if not halves.isfinite().all():
            raise ValueError(f"as large as {frames.abs().max():.3g}, beyond the range of fp16")
        return halves.numpy().tobytes()
    scale = frames.abs().amax(dim=1, keepdim=True) / 127  # (F, 1)
    quantised = (frames / scale.where(scale > 0, 1.0)).round().to(torch.int8)
    return scale.numpy().tobytes() + quantised.numpy().tobytes()


def unpack(data: np.ndarray, width: int, storage: Storage) -> Tensor:
    """The bytes (uint8) of some frames -> (F, width): float16, or float32 from int8."""
    data = np.array(data)  # out of the map: aligned, and ours to write to
    if storage == "fp16":
        return torch.from_numpy(data.view("<f2").reshape(-1, width))
    scales = 4 * (len(data) // (width + 4))  # bytes
    scale = torch.from_numpy(data[:scales].view("<f4"))[:, None]
    return torch.from_numpy(data[scales:].view("i1").reshape(-1, width)) * scale


def _whole_records(raw: bytes) -> np.ndarray:
    records = np.frombuffer(raw, _RECORD, count=len(raw) // RECORD_BYTES)
    sums = [zlib.crc32(raw[i * RECORD_BYTES : (i + 1) * RECORD_BYTES - 4]) for i in range(len(records))]
    return records[records["sum"] == np.array(sums, "<u4")]


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
