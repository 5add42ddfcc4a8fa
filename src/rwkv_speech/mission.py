"""Mission files: the few trained tensors that make a frozen model do one job.

`rwkv-adapter-<step>.pth` is a plain state dict with the names that others publish and read. What a reader must know
beside the weights stands in a JSON file of the same name; where that is absent, sizes come from the tensors.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.errors import UserError

STATE = "language_model.blocks.{}.att.time_state"
ADAPTER = "speech_encoder.adapter."
_NAME = re.compile(r"language_model\.blocks\.\d+\.att\.time_state|speech_encoder\.adapter\.[02]\.(weight|bias)")


class MissionError(UserError):
    """A mission file that can't be read, or that doesn't fit."""


@dataclass(frozen=True)
class Mission:
    """What a mission file holds.

    path: where it came from.
    tensors: name -> tensor, as in the file.
    info: what stands in the JSON file beside it, or nothing.
    """

    path: Path
    tensors: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def n_layer(self) -> int:
        return sum(name.startswith("language_model.") for name in self.tensors)

    @property
    def hidden(self) -> int:
        return self.tensors[f"{ADAPTER}0.weight"].shape[0]

    @property
    def inputs(self) -> int:
        """Inputs of the adapter: K times the width of the encoder."""
        return self.tensors[f"{ADAPTER}0.weight"].shape[1]


def read_mission(path: str | Path) -> Mission:
    """Reads a mission file, ours or one with only the published names.

    Raises:
        MissionError: no such file, not a state dict of tensors, names missing or unknown, or inconsistent shapes.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissionError(f"mission file {path}: no such file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything on a damaged file
        raise MissionError(f"mission file {path}: cannot be read as a PyTorch weight file ({_line(error)})") from error
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise MissionError(f"mission file {path}: expected a state dict of tensors")
    unknown = [name for name in tensors if not _NAME.fullmatch(name)]
    n_layer = sum(name.startswith("language_model.") for name in tensors)
    names = [STATE.format(layer) for layer in range(max(n_layer, 1))]
    names += [f"{ADAPTER}{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    missing = [name for name in names if name not in tensors]
    if unknown or missing:
        problems = [f"{what} {', '.join(found[:3])}{' ...' * (len(found) > 3)}"
                    for what, found in (("unknown names", unknown), ("missing", missing)) if found]  # fmt: skip
        raise MissionError(f"mission file {path}: {'; '.join(problems)}")
    return Mission(path, tensors, _read_info(path.with_suffix(".json")))


def write_mission(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes the file and its JSON, each under a temporary name first, the weights last.

    A reader never meets half a file, and never weights without what belongs to them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(dict(info), indent=2) + "\n")
        os.replace(temporary, path.with_suffix(".json"))
        torch.save({name: x.detach().cpu().clone() for name, x in tensors.items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def newest_mission(folder: Path) -> Path:
    """The mission file written last.

    Raises:
        MissionError: the folder holds none.
    """
    files = list(folder.glob("rwkv-adapter-*.pth"))
    if not files:
        raise MissionError(
            f"{folder} holds no mission file (rwkv-adapter-*.pth): train first, or name one by --adapter"
        )
    return max(files, key=lambda path: path.stat().st_mtime_ns)


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise MissionError(f"{path}: cannot be read as JSON ({_line(error)}); mend or remove it") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
