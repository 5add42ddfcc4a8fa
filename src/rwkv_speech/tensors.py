"""Files of named tensors, read in place and as data only, whoever made them."""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rwkv_speech.errors import UserError, reason

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that weights may have
_ZIP_MAGIC = b"PK\x03\x04"  # torch.save since 1.6
_PICKLE_MAGIC = b"\x80"  # torch.save before


class WeightsError(UserError):
    """A weight file that can't be read, or doesn't hold what it should."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of any `.pth` or `.safetensors` file, in place, as data only: nothing in it is run.

    Raises:
        WeightsError: what is wrong with the file, without its name.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise WeightsError(f"{what}; expected a weight file (.pth or .safetensors)")
    try:
        content = _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
        size = path.stat().st_size
    except OSError as error:
        raise WeightsError(f"can't be read ({error.strerror or error}); expected a readable file") from None
    if not isinstance(content, dict):
        what = type(content).__name__
        raise WeightsError(f"holds a {what}; expected a dict of tensors: save the model's state_dict()")
    named = {key for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if strangers := [str(key) for key in content if key not in named]:
        raise WeightsError(
            f"holds more than named tensors ({few(strangers)}); expected a plain dict of tensors: "
            "save the model's state_dict(), not a whole checkpoint"
        )
    if strange := [name for name, x in content.items() if x.layout != torch.strided or x.device.type != "cpu"]:
        raise WeightsError(f"holds tensors without numbers ({few(strange)}); expected dense tensors")
    # One number may stand for many (strides of 0), and one matrix be named twice (embedding and head), but not more.
    if (claimed := sum(x.nbytes for x in content.values())) > 2 * size:
        raise WeightsError(
            f"holds {size:,} bytes, which its tensors make {claimed:,} of by repetition; save them again, each with "
            ".contiguous()"
        )
    return {name: tensor.detach() for name, tensor in content.items()}


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise WeightsError(f"is truncated or no safetensors file ({reason(error)}); get the file again") from None


def _open_torch(path: Path) -> object:
    with path.open("rb") as file:
        start = file.read(16)
    is_zip = start.startswith(_ZIP_MAGIC)
    if not is_zip and not start.startswith(_PICKLE_MAGIC):
        what = f"starts with {start!r}" if start else "is empty"
        raise WeightsError(f"{what}; expected a weight file of torch.save (or a .safetensors); get the file again")
    try:
        if is_zip and _is_compressed(path):
            raise WeightsError(
                "is compressed: another program packed it again; get the original file, or unpack this one and pack "
                "it without compression (zip -0)"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, WeightsError):
        raise
    except Exception as error:  # from damaged bytes torch raises almost any class
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise WeightsError(
                f"holds Python objects ({found[1]}), which are not loaded because they could run code, or is "
                "damaged; expected only tensors: save the model's state_dict()"
            ) from None
        raise WeightsError(f"is truncated or damaged ({reason(error)}); get the file again") from None


def _is_compressed(path: Path) -> bool:
    """Whether a zip file has compressed parts, as torch.save never writes them.

    torch would map them into memory and take them for numbers; unpacked, they could fill the memory.

    Raises:
        zipfile.BadZipFile: it is no whole zip file.
    """
    with zipfile.ZipFile(path) as archive:
        return any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())


def few(names: list[str], limit: int = 4) -> str:
    """The first of them, none much longer than a line, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:200] for name in names[:limit]) + more
