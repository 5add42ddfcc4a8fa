"""Peak memory and time of opening a model with the 1.6B model's shapes (24 x 2048, bf16): one JSON line.

A new process opens the file, from a cold page cache. Opening only maps it, so the process then reads every byte
of every tensor, and takes its memory again: `peak_open` and `peak_read_all`, as the kernel counts (VmHWM, with
mapped file pages). `resident_before` is what it had before, torch itself most of all. The bound is held against
`peak_open`, and against `peak_read_all` less `resident_before`. The CRC-32 of what was read is compared with the
file's own zip directory, which torch wrote and Python's zipfile reads.

python bench/load.py [--dir DIR] [--reader {model,weights}]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.random_model import write_model
from rwkv_speech.lm.initialise import official_sizes

BOUND = 1.15  # peak resident memory / file size


def measure(path: Path, reader: str) -> dict:
    """Opens the file in this process and reads it all; seconds, and memory in bytes."""
    if reader == "model":
        from rwkv_speech import lm

        def read() -> dict[str, Tensor]:
            return lm.load(path).state_dict()
    else:
        from rwkv_speech.lm.weights import read_weights

        def read() -> dict[str, Tensor]:
            return read_weights(path)[1]

    before = _memory("VmRSS")
    start = time.perf_counter()
    tensors = read()
    seconds = time.perf_counter() - start
    peak_open = _memory("VmHWM")
    start = time.perf_counter()
    sums = {name: [str(tensor.dtype), _crc32(tensor)] for name, tensor in tensors.items()}
    return {
        "open_seconds": round(seconds, 3),
        "read_all_seconds": round(time.perf_counter() - start, 3),
        "resident_before": before,
        "peak_open": peak_open,
        "peak_read_all": _memory("VmHWM"),
        "sums": sums,
    }


def sums_of_file(path: Path) -> dict[str, list]:
    """Name -> dtype and CRC-32 of each tensor; torch.save numbers the records in the order of the dict."""
    names = torch.load(path, weights_only=True, mmap=True)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename.split("/", 1)[1]: info.CRC for info in archive.infolist()}
    return {name: [str(tensor.dtype), records[f"data/{i}"]] for i, (name, tensor) in enumerate(names.items())}


def drop_from_page_cache(path: Path) -> None:
    """Asks the kernel to forget the file's pages, so that opening it reads the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _memory(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where the model is kept; default: a temporary folder")
    parser.add_argument("--reader", choices=["model", "weights"], default="model", help="what opens the file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the new process's part
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.reader)))
        return

    with tempfile.TemporaryDirectory() as temporary:
        path = (args.dir or Path(temporary)) / "random-24x2048-bf16.pth"
        if not path.exists():
            write_model(path, official_sizes(n_layer=24, n_embd=2048), dtype=torch.bfloat16, seed=0)
        expected, size = sums_of_file(path), path.stat().st_size
        drop_from_page_cache(path)
        command = [sys.executable, __file__, "--reader", args.reader, "--measure", str(path)]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    # What a reader keeps in another form has other bytes; it is counted as not compared, not as wrong.
    found = {name: value for name, value in result.pop("sums").items() if name in expected}
    same_form = {name: value for name, value in found.items() if value[0] == expected[name][0]}
    if wrong := [name for name, value in same_form.items() if value != expected[name]]:
        raise SystemExit(f"tensors differ from the file: {', '.join(wrong)}")
    if not same_form:
        raise SystemExit("no tensor could be compared with the file; expected the reader to keep official names")
    open_ratio = result["peak_open"] / size
    own_ratio = (result["peak_read_all"] - result["resident_before"]) / size
    line = {
        "bench": "load",
        "model": "24 x 2048, vocabulary 65536, bf16, random",
        "reader": args.reader,
        "file_bytes": size,
        **result,
        "peak_open_over_file": round(open_ratio, 4),
        "peak_read_all_over_file": round(result["peak_read_all"] / size, 4),
        "peak_read_all_less_before_over_file": round(own_ratio, 4),
        "bound": BOUND,
        "within_bound": max(open_ratio, own_ratio) <= BOUND,
        "tensors_compared": len(same_form),
        "tensors_in_file": len(expected),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
