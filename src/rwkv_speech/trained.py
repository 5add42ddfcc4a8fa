"""What is trained, in one list, and the mission files that hold it.

The list says of each tensor under which name it is saved, how it learns, and what it is a part of: optimiser, clipping,
averaging, mission files, resume points and DeepSpeed's split of frozen and trained all read it.

A mission file, `rwkv-adapter-<step>.pth`, is a plain state dict with the names that others publish and read. What a
reader must know beside the weights stands in a JSON file of the same name; where that is absent, sizes come from the
tensors.
"""

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_speech.errors import UserError
from rwkv_speech.files import PARTIAL, writing
from rwkv_speech.lm.language_model import LanguageModel
from rwkv_speech.options import TrainingOptions
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.frame_cache import AbsentEncoder

STATE = "language_model.blocks.{}.att.time_state"
ADAPTER = "speech_encoder.adapter."
_NAME = re.compile(r"language_model\.blocks\.\d+\.att\.time_state|speech_encoder\.adapter\.[02]\.(weight|bias)")


@dataclass(frozen=True)
class TrainedTensor:
    """One trained tensor.

    parameter: fp32, in the model.
    part: "adapter" or "state"; the latter's learning rate is scaled by `state_lr_scale`.
    decay: whether weight decay is for it.
    """

    parameter: nn.Parameter
    part: str
    decay: bool


def trained_tensors(language_model: LanguageModel, adapter: Adapter) -> dict[str, TrainedTensor]:
    """Everything that is trained, under its name in a mission file."""
    states = {
        STATE.format(i): TrainedTensor(state, "state", decay=False)
        for i, state in enumerate(language_model.time_states)
    }
    return states | {
        f"{ADAPTER}{name}": TrainedTensor(x, "adapter", decay=x.dim() > 1)
        for name, x in adapter.layers.named_parameters()
    }


def parameter_groups(tensors: Mapping[str, TrainedTensor], training: TrainingOptions) -> list[dict[str, Any]]:
    """What is trained as groups for a torch optimiser, each with its learning rate and weight decay."""
    scales = {"state": training.state_lr_scale}
    groups = []
    for part, still in sorted({(x.part, not x.decay) for x in tensors.values()}):
        params = [x.parameter for x in tensors.values() if (x.part, x.decay) == (part, not still)]
        groups.append(
            {
                "params": params,
                "lr": training.lr_init * scales.get(part, 1.0),
                "weight_decay": 0.0 if still else training.weight_decay,
                "name": part,
            }
        )
    return groups


class MissionFileError(UserError):
    """A mission file that can't be read, or that doesn't fit."""


@dataclass(frozen=True)
class MissionFile:
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


def read_mission_file(path: str | Path) -> MissionFile:
    """Reads a mission file, ours or one with only the published names.

    Raises:
        MissionFileError: no such file, not a state dict of tensors, names missing or unknown, or inconsistent shapes.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissionFileError(f"mission file {path}: no such file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything on a damaged file
        raise MissionFileError(
            f"mission file {path}: cannot be read as a PyTorch weight file ({_line(error)})"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in tensors.items()
    ):
        raise MissionFileError(f"mission file {path}: expected a state dict of tensors")
    unknown = [name for name in tensors if not _NAME.fullmatch(name)]
    n_layer = sum(name.startswith("language_model.") for name in tensors)
    names = [STATE.format(layer) for layer in range(max(n_layer, 1))]
    names += [f"{ADAPTER}{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    missing = [name for name in names if name not in tensors]
    if unknown or missing:
        problems = [f"{what} {', '.join(found[:3])}{' ...' * (len(found) > 3)}"
                    for what, found in (("unknown names", unknown), ("missing", missing)) if found]  # fmt: skip
        raise MissionFileError(f"mission file {path}: {'; '.join(problems)}")
    if problem := _inconsistency(tensors, n_layer):
        raise MissionFileError(f"mission file {path}: {problem}")
    if spoilt := [name for name, x in tensors.items() if not x.isfinite().all()]:
        raise MissionFileError(f"mission file {path}: {spoilt[0]} holds numbers that are not finite; use another file")
    return MissionFile(path, tensors, _read_info(path.with_suffix(".json")))


def write_mission_file(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes the file and its JSON, each under a temporary name first, the weights last.

    A reader never meets half a file, and never weights without what belongs to them.
    """
    content = io.BytesIO()
    torch.save({name: x.detach().cpu().clone() for name, x in tensors.items()}, content)
    weights, beside = (path.with_name(f".{path.stem}{suffix}{PARTIAL}") for suffix in (".pth", ".json"))
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(dict(info), indent=2, allow_nan=False) + "\n")
            weights.write_bytes(content.getbuffer())
            os.replace(beside, path.with_suffix(".json"))
            os.replace(weights, path)
    finally:
        weights.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)


def newest_mission_file(folder: Path) -> Path:
    """The mission file written last.

    Raises:
        MissionFileError: the folder holds none.
    """
    files = list(folder.glob("rwkv-adapter-*.pth"))
    if not files:
        raise MissionFileError(
            f"{folder} holds no mission file (rwkv-adapter-*.pth): train first, or name one by --adapter"
        )
    return max(files, key=lambda path: path.stat().st_mtime_ns)


def best_mission_file(folder: Path) -> tuple[Path, str]:
    """The best of the run that wrote the newest mission file, by its validation, else the newest; and which it is.

    Raises:
        MissionFileError: the folder holds none.
    """
    newest = newest_mission_file(folder)
    run = _read_info(newest.with_suffix(".json")).get("run")
    infos = {path: _read_info(path.with_suffix(".json")) for path in folder.glob("rwkv-adapter-*.pth")}
    best = {path: info for path, info in infos.items() if run and info.get("run") == run and "best_by" in info}
    if not best:
        return newest, "the newest"
    # Each of these was better than all before it.
    path, info = max(best.items(), key=lambda item: item[1]["step"])
    score = f"the best of its run by validation ({info['best_by']} {info[info['best_by']]:.4g})"
    return path, score if path == newest else f"{score}; the newest is {newest.name}"


def check_fit(
    mission: MissionFile,
    model: LanguageModel,
    encoder: SpeechEncoder | AbsentEncoder,
    downsample_k: int | None,
    hidden: int | None,
) -> None:
    """Checks that a mission file goes with the parts around it.

    downsample_k, hidden: what is asked for besides, or None.

    Raises:
        MissionFileError: one line that names everything in which they differ.
    """
    sizes = model.sizes
    state_shape = (sizes.n_head, sizes.head_size, sizes.head_size)
    of_model = f"language model is {sizes.n_layer} x {sizes.n_embd}"
    problems = []
    trained_with = mission.info.get("generation", sizes.generation)
    if trained_with != sizes.generation:
        problems.append(f"states for an RWKV-{trained_with}, but the language model is an RWKV-{sizes.generation}")
    state = tuple(mission.tensors[STATE.format(0)].shape)
    if mission.n_layer != sizes.n_layer or state != state_shape:
        problems.append(f"states of {mission.n_layer} layers x {state}, but the {of_model}, states {state_shape}")
    out = mission.tensors[f"{ADAPTER}2.weight"].shape[0]
    if out != sizes.n_embd:
        problems.append(f"an adapter to width {out}, but the {of_model}")
    stated_k = mission.info.get("downsample_k")
    for k, where in ((stated_k, "its JSON file says"), (downsample_k, "--downsample_k is")):
        if k and k * encoder.width != mission.inputs:
            problems.append(
                f"an adapter from {mission.inputs} inputs, but {where} K = {k} and encoder {encoder.name} has width "
                f"{encoder.width}"
            )
    if not stated_k and not downsample_k and mission.inputs % encoder.width:
        problems.append(
            f"an adapter from {mission.inputs} inputs, no multiple of encoder {encoder.name}'s width {encoder.width}"
        )
    if hidden and hidden != mission.hidden:
        problems.append(f"{mission.hidden} hidden units, but --adapter_hidden is {hidden}")
    if problems:
        raise MissionFileError(f"mission file {mission.path} does not fit: it holds {'; it holds '.join(problems)}")


def _inconsistency(tensors: Mapping[str, Tensor], n_layer: int) -> str | None:
    """In what the tensors are no states of one shape (H, N, N) and no two Linear layers in a row, if so."""
    (hidden, inputs, *_), (out, *_) = ((*tensors[f"{ADAPTER}{i}.weight"].shape, 1, 1) for i in (0, 2))
    heads, size, *_ = (*tensors[STATE.format(0)].shape, 1, 1)
    expected = {STATE.format(layer): (heads, size, size) for layer in range(n_layer)}
    expected |= {f"{ADAPTER}0.weight": (hidden, inputs), f"{ADAPTER}0.bias": (hidden,)}
    expected |= {f"{ADAPTER}2.weight": (out, hidden), f"{ADAPTER}2.bias": (out,)}
    wrong = [(name, tuple(tensors[name].shape)) for name, shape in expected.items() if tensors[name].shape != shape]
    if wrong:
        (name, shape), more = wrong[0], f", and {len(wrong) - 1} more like it" * (len(wrong) > 1)
        return f"{name} is {shape}, but by its other tensors should be {expected[name]}{more}"
    strange = [(name, x.dtype) for name, x in tensors.items() if not x.is_floating_point()]
    return f"{strange[0][0]} holds {strange[0][1]}, expected floating-point numbers" if strange else None


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise MissionFileError(f"{path}: cannot be read as JSON ({_line(error)}); mend or remove it") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
