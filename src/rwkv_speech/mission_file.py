"""Mission files: what is trained for one task, on disk.

`rwkv-adapter-<step>.pth` is a plain state dict with the names that others publish and read. What a reader must know
beside the weights stands in a JSON file of the same name; where that is absent, sizes come from the tensors. LoRA and
its kin lie in a folder of the same name without the suffix, in the form of the library peft.
"""

import hashlib
import io
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.errors import UserError, reason
from rwkv_speech.files import PARTIAL, writing
from rwkv_speech.lm import peft
from rwkv_speech.lm.peft import PeftWeights
from rwkv_speech.mission_hub import fetch_mission, is_on_hub
from rwkv_speech.missions import MISSIONS
from rwkv_speech.speech.hub import encoder_folder
from rwkv_speech.speech.identity import encoder_digest, hash_tensors
from rwkv_speech.tensors import DTYPES, WeightsError, few, read_tensors
from rwkv_speech.trained import ADAPTER, STATE

log = logging.getLogger("rwkv_speech")

_FILE = re.compile(r"rwkv-adapter-(\d+)(-avg\d+)?(?:-run(\d+)(?:-(\d+))?)?")
_NAME = re.compile(r"language_model\.blocks\.\d+\.att\.time_state|speech_encoder\.adapter\.[02]\.(weight|bias)")
_STATE_NAME = re.compile(r"blocks\.\d+\.att\.time_state")  # in a file of states alone, as RWKV-PEFT writes it
# What is read of the JSON file, and its type.
_INFO = {
    **{"mission": str, "labels": list, "encoder": str, "encoder_digest": str},
    **{"downsample_k": int, "generation": int, "quant": str, "peft": str},
}


class MissionFileError(UserError):
    """A mission file that can't be read, or that doesn't fit."""


@dataclass(frozen=True)
class MissionFile:
    """What a mission file holds.

    path: where it came from.
    tensors: name -> tensor, as in the file.
    info: what stands in the JSON file beside it, or nothing.
    peft: what the folder beside it holds, or None.
    """

    path: Path
    tensors: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)
    peft: PeftWeights | None = None

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

    @property
    def mission(self) -> str:
        return self.info.get("mission") or "transcribe"

    def has_adapter_of(self, other: "MissionFile") -> bool:
        names = [name for name in self.tensors if name.startswith(ADAPTER)]
        return all(torch.equal(self.tensors[name], other.tensors[name]) for name in names)

    @property
    def trained_audio_s(self) -> float | None:
        """The longest recording of its training, in seconds; None where the JSON file doesn't say.

        Raises:
            MissionFileError: it says something else.
        """
        seconds = self.info.get("trained_audio_s")
        if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds < math.inf):
            raise MissionFileError(
                f"{self.path.with_suffix('.json')}: trained_audio_s is {seconds!r}, expected seconds; mend or remove it"
            )
        return seconds


def read_mission_file(path: str | Path) -> MissionFile:
    """Reads a mission file, ours or one with only the published names; `OWNER/NAME` is one of the Hugging Face hub.

    Raises:
        UserError: it is not on the hub, or can't be fetched.
        MissionFileError: no such file, not a state dict of tensors, names missing or unknown, inconsistent shapes, or
            numbers that are not finite.
    """
    path = Path(path).expanduser()
    if is_on_hub(path):
        path, _ = best_mission_file(fetch_mission(str(path)))
    beside = path.with_suffix(".json")
    try:
        info = beside.read_bytes() if beside.is_file() else None  # before the weights, which training removes first
    except OSError as error:
        raise MissionFileError(f"{beside}: cannot be read ({reason(error)})") from error
    try:
        tensors = read_tensors(path)
    except WeightsError as error:
        raise MissionFileError(f"mission file {path}: {error}") from None
    if tensors and all(map(_STATE_NAME.fullmatch, tensors)):
        raise MissionFileError(
            f"mission file {path}: holds initial states without an adapter; name it by --load_state, beside the "
            "--adapter that it goes with"
        )
    unknown = [name for name in tensors if not _NAME.fullmatch(name)]
    n_layer = sum(name.startswith("language_model.") for name in tensors)
    names = [STATE.format(layer) for layer in range(max(n_layer, 1))]
    names += [f"{ADAPTER}{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    missing = [name for name in names if name not in tensors]
    if unknown or missing:
        kinds = {"unknown names": unknown, "missing": missing}
        problems = [f"{what} {few(found)}" for what, found in kinds.items() if found]
        raise MissionFileError(f"mission file {path}: {'; '.join(problems)}")
    if problem := _inconsistency(tensors, n_layer):
        raise MissionFileError(f"mission file {path}: {problem}")
    info = None if info is None else _parse_info(beside, info)
    folder = path.with_suffix("")
    if info.get("peft") if info is not None else (folder / peft.CONFIG).is_file():
        try:
            return MissionFile(path, tensors, info or {}, peft.read_folder(folder))
        except WeightsError as error:
            raise MissionFileError(f"mission file {path}: {error}") from None
    return MissionFile(path, tensors, info or {})


def trained_digest(tensors: Mapping[str, Tensor], beside_model: PeftWeights | None) -> str:
    """16 hexadecimal digits of what a mission file holds, or what a model has under the names of one."""
    found = hashlib.blake2b(digest_size=8)
    hash_tensors(found, {name: x.float() for name, x in tensors.items()})  # as a model keeps them
    if beside_model:
        hash_tensors(found, beside_model.tensors)
        found.update(json.dumps(beside_model.config, sort_keys=True).encode())
    return found.hexdigest()


def read_states(path: str | Path, n_layer: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Reads a file of initial states alone, as RWKV-PEFT writes them.

    n_layer, shape: how many there are to be, and their shape (H, N, N).

    Returns:
        The states, index [value, key], under their names in a mission file.

    Raises:
        MissionFileError: no such file, something else in it, or states of another model.
    """
    path = Path(path).expanduser()
    try:
        tensors = read_tensors(path)
    except WeightsError as error:
        raise MissionFileError(f"state file {path}: {error}") from None
    expected = {f"blocks.{layer}.att.time_state": shape for layer in range(n_layer)}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    if found != expected:
        name = next(iter(found.keys() ^ expected.keys()), None) or next(n for n in found if found[n] != shape)
        is_there = f"is {found[name]}" if name in found else "is missing"
        raise MissionFileError(
            f"state file {path}: {name} {is_there}; expected blocks.<layer>.att.time_state {shape} of "
            f"{n_layer} layers, and nothing else"
        )
    if problem := _without_sense(tensors):
        raise MissionFileError(f"state file {path}: {problem}")
    return {f"language_model.{name}": x for name, x in tensors.items()}


def chosen_encoder(file: MissionFile, asked: str | None) -> str | None:
    """The encoder that goes with a mission file: the one asked for, else the one that it names, if it does.

    The log says where they differ, and what an unasked name would fetch.

    Raises:
        MissionFileError: the file names a folder that is not here.
    """
    named, digest = file.info.get("encoder"), file.info.get("encoder_digest")
    if not named:
        return asked
    if asked:
        folder = encoder_folder(asked)
        if named not in (asked, str(folder)) and not (folder and digest == encoder_digest(folder)):
            log.warning("%s was trained with the encoder %s, not %s", file.path, named, asked)
        return asked
    try:
        folder = encoder_folder(named)
    except UserError:
        raise MissionFileError(
            f"mission file {file.path} was trained with the encoder {named}, which is no folder here: name it by "
            "--encoder"
        ) from None
    if not folder:
        log.info("%s asks for the encoder %s from the Hugging Face hub", file.path, named)
    elif digest and digest != encoder_digest(folder):
        log.warning("%s was trained with another encoder than the one that %s holds now", file.path, named)
    return named


def write_mission_file(
    path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any], beside_model: PeftWeights | None = None
) -> None:
    """Writes the file, its JSON and its folder, each under a temporary name first, the weights last.

    A reader never meets half a file, and never weights without what belongs to them.
    """
    if beside_model:
        info = {**info, "peft": peft.method_of(beside_model.config)}
        peft.write_folder(path.with_suffix(""), beside_model)
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


def remove_mission_file(path: Path) -> None:
    """Removes what `write_mission_file` wrote; the weights first. A folder that its JSON doesn't tell of stays."""
    with_folder = _info_beside(path).get("peft")
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)
    if with_folder:
        peft.remove_folder(path.with_suffix(""))


def newest_mission_file(folder: Path) -> Path:
    """The mission file that training in a folder has come to, whatever times its files have: a copy has new ones.

    In this order: of the run that began last, by the JSON beside it (without that, before all that have it); of its
    highest step; of the files of that step the mean (`-avg<N>`), which is written last.

    Raises:
        MissionFileError: the folder holds none.
    """
    files = list(folder.glob("rwkv-adapter-*.pth"))
    if not files:
        raise MissionFileError(
            f"{folder} holds no mission file (rwkv-adapter-*.pth): train first, or name one by --adapter"
        )
    return max(files, key=_age)


def best_mission_file(folder: Path) -> tuple[Path, str]:
    """The best of the newest run by its validation, else the newest mission file; and which of these it is.

    Raises:
        MissionFileError: the folder holds none.
    """
    newest = newest_mission_file(folder)
    run = _info_beside(newest).get("run")
    scored = []  # step, path, name of the score, score
    for path in folder.glob("rwkv-adapter-*.pth") if run else ():
        info = _info_beside(path)
        step, name = info.get("step"), str(info.get("best_by"))
        if info.get("run") == run and type(step) is int and type(info.get(name)) in (int, float):
            scored.append((step, path, name, info[name]))
    if not scored:
        return newest, "the newest"
    _, path, name, score = max(scored)  # each of them was better than all before it
    which = f"the best of its run by validation ({name} {score:.4g})"
    return path, which if path == newest else f"{which}; the newest is {newest.name}"


def mission_folder(project: Path, mission: str, *, of_several: bool) -> Path:
    """Where a run keeps the mission files of a mission."""
    return project / mission if of_several else project


def best_mission_files(project: Path) -> list[tuple[Path, str]]:
    """`best_mission_file` of the newest run of a project, for each of its missions.

    Raises:
        MissionFileError: the project holds none.
    """
    folders = {
        path.parent
        for kind in MISSIONS
        for path in (*project.glob(f"{kind}/rwkv-adapter-*.pth"), *project.glob(f"{kind}/*/rwkv-adapter-*.pth"))
        if _info_beside(path).get("mission") == path.parent.relative_to(project).as_posix()
    }
    if not folders:
        return [best_mission_file(project)]
    newest = {folder: newest_mission_file(folder) for folder in (project, *sorted(folders)) if _holds_any(folder)}
    last = max(newest, key=lambda folder: _age(newest[folder])[0])
    runs = {folder: _info_beside(path).get("run") for folder, path in newest.items() if folder != project}
    found = [folder for folder, run in runs.items() if run == runs[last]] if last in runs else [project]
    return [best_mission_file(folder) for folder in found]


def read_best_mission_files(project: Path) -> list[tuple[MissionFile, str]]:
    """`best_mission_files`, read; also while training beside it writes better ones and removes these.

    Raises:
        MissionFileError: the project holds none, or one can't be read.
    """
    while True:
        paths = best_mission_files(project)
        try:
            return [(read_mission_file(path), which) for path, which in paths]
        except MissionFileError:
            if all(path.exists() for path, _ in paths):
                raise


def _holds_any(folder: Path) -> bool:
    return any(folder.glob("rwkv-adapter-*.pth"))


def _age(path: Path) -> tuple[str, int, bool, int, int, str]:
    """What orders mission files from the oldest to the newest."""
    began = str(_info_beside(path).get("run_began", ""))
    found = _FILE.fullmatch(path.stem)
    step, mean, run, copy = found.groups() if found else (None,) * 4
    return began, int(step or -1), mean is not None, int(run or 0), int(copy or 0), path.name


def _info_beside(path: Path) -> dict[str, Any]:
    """What the JSON file of a mission file holds; nothing where it can't be read."""
    with suppress(OSError, ValueError, RecursionError):
        info = json.loads(path.with_suffix(".json").read_bytes())
        return info if isinstance(info, dict) else {}
    return {}


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
    return _without_sense(tensors)


def _without_sense(tensors: Mapping[str, Tensor]) -> str | None:
    """Which tensor holds what computes nothing, if one does; these files are small enough to look."""
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            return f"{name} holds {x.dtype}, expected floating-point numbers"
        if not x.isfinite().all():
            return f"{name} holds NaN or infinite numbers; take an earlier file"
    return None


def _parse_info(path: Path, content: bytes) -> dict[str, Any]:
    try:
        info = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise MissionFileError(f"{path}: cannot be read as JSON ({reason(error)}); mend or remove it") from error
    if not isinstance(info, dict):
        raise MissionFileError(f"{path}: holds a {type(info).__name__}, expected an object; mend or remove it")
    for name, kind in _INFO.items():
        value = info.get(name)
        fits = value is None or type(value) is kind
        if not fits or (kind is list and value and not all(isinstance(x, str) for x in value)):
            what = "a list of texts" if kind is list else f"of type {kind.__name__}"
            raise MissionFileError(f"{path}: {name} is {str(value)[:100]!r}, expected {what}; mend or remove it")
    return info
