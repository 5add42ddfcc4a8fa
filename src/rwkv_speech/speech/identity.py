"""Identity of an encoder, by all that its frames depend on, and stamps of files, which change when a file does."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.files import printable
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.hub import encoder_folder, hub_is_reachable

_VERSION = 1  # of what this package itself does to audio on its way to frames: raised when frames change


def encoder_identity(encoder: SpeechEncoder) -> str:
    """32 hexadecimal digits that differ where an encoder's frames may: weights, configuration, features, type."""
    settings = {
        "version": _VERSION,
        "family": type(encoder).__name__,
        "config": _lasting(encoder.model.config.to_dict()),
        "feature_extractor": _lasting(encoder.feature_extractor.to_dict()),
    }
    found = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    hash_tensors(found, encoder.model.state_dict())
    return found.hexdigest()


def hash_tensors(found: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    """Takes tensors into a hash: names, types, shapes and values."""
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def hash_sampled(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of tensors, of which some 64 values each are looked at."""
    found = hashlib.blake2b(digest_size=8)
    hash_tensors(found, {name: x.reshape(-1)[:: max(1, x.numel() // 64)] for name, x in tensors.items()})
    return found.hexdigest()


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    """Without where they came from and who wrote them."""
    return {key: x for key, x in settings.items() if not key.startswith("_") and key != "transformers_version"}


_MIDDLE = 2**20  # bytes
_CONFIGS = ("config.json", "preprocessor_config.json")


def encoder_digest(folder: Path) -> str:
    """32 hexadecimal digits of what an encoder's folder holds, wherever that lies.

    Of large files the size and the middle count, so that it takes no time; sets of weights differ there as anywhere.
    """
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.name in _CONFIGS or path.suffix in (".safetensors", ".bin"):
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size // 2 - _MIDDLE // 2))
                found.update(f"{path.name} {size} ".encode() + file.read(_MIDDLE))
    return found.hexdigest()


def encoder_stamp(name: str, dtype: torch.dtype) -> str | None:
    """Stands for all that decides on an encoder's identity; None where only loading shows it."""
    folder = encoder_folder(name)
    if not folder:
        from huggingface_hub import hf_hub_download

        try:  # asks the hub for a newer version, as loading would; without a network, what is here
            folder = Path(hf_hub_download(name, "config.json", local_files_only=not hub_is_reachable())).parent
        except Exception:  # of a dozen kinds, which loading will explain
            return None
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    stamps = [file_stamp(path) for path in files]
    if None in stamps or all(path.suffix == ".json" for path in files):
        return None
    everything = [_VERSION, metadata.version("transformers"), str(dtype), *stamps]
    return hashlib.blake2b(json.dumps(everything).encode(), digest_size=16).hexdigest()


SETTLED = 2.0  # s; no file system's clock ticks more slowly


def file_stamp(path: Path, *, strict: bool = True) -> str | None:
    """Path, size and times of a file, links followed; any change of the content changes the stamp.

    strict: the time of the inode's change is part of it: unlike that of the content, it can't be set back, nor does a
        copy keep it. A file that changed so recently that one more change could leave the same times has no stamp.

    Returns:
        None where there is no such file, or no stamp for it.
    """
    try:
        path = path.resolve() if strict else os.path.abspath(path)  # much faster
        found = os.stat(path)
    except (OSError, ValueError, RuntimeError):  # also a name with a NUL, and links in a circle
        return None
    stamp = f"{printable(path)} {found.st_size} {found.st_mtime_ns}"
    if not strict:
        return stamp
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < SETTLED * 1e9:
        return None
    return f"{stamp} {found.st_ctime_ns}"
