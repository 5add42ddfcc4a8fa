"""What was trained, in the forms that others read.

- merged: states and LoRA in the weights of the language model, a `.pth` in the official form.
- state: `blocks.<layer>.att.time_state` (H, N, N) fp32, index [value, key], as RWKV-PEFT writes states and RWKV-Runner
  reads them: that transposes those of RWKV-6 by itself, and not those of RWKV-7 (backend-python/utils/rwkv.py).
- ai00: the same in safetensors, fp16, index [key, value], as web-rwkv reads it (cryscan/web-rwkv: `read_state` in
  src/runtime/v6.rs and v7.rs, of what convert_safetensors.py makes of a state).
- hub: the mission file, its JSON and folder, and a model card.
"""

import io
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from rwkv_speech import lm
from rwkv_speech.errors import UserError
from rwkv_speech.files import PARTIAL, check_folder, write_whole, writing
from rwkv_speech.lm import peft
from rwkv_speech.lm.linear import Linear
from rwkv_speech.lm.peft import PeftWeights
from rwkv_speech.lm.quantised import dequantise, quantise
from rwkv_speech.lm.weights import ModelSizes, read_weights
from rwkv_speech.mission_file import MissionFile, read_states, write_mission_file
from rwkv_speech.ops.common import check_model_file, only_mission_file
from rwkv_speech.ops.model_card import model_card, without_folders
from rwkv_speech.options import Options
from rwkv_speech.terminal import say

log = logging.getLogger("rwkv_speech")


def export(options: Options) -> int:
    """Writes the form that is asked for; prints the name of what it wrote."""
    given, to = options.model, options.to
    if to == "merged":
        check_model_file(given)
    if given.load_peft and to != "merged":
        raise UserError(f"--load_peft goes with --to merged: --to {to} has no place for it")
    if given.load_state and to == "hub":
        raise UserError("--load_state does not go with --to hub, which takes a mission file as it was trained")
    (file,) = only_mission_file(options)
    folder = Path(options.output_dir).expanduser() if options.output_dir else options.project / "export"
    check_folder(folder, "output_dir")
    path = folder / _name(to, file.path.stem, given.load_model)
    if path.is_file():
        raise UserError(f"{path} is there already: remove it, or name another folder by --output_dir")
    if to == "hub":
        _write_for_hub(folder, file, options)
    elif to == "merged":
        _write_merged(path, file, options)
    else:
        if file.peft:
            log.warning(
                "%s also has weights of %s, which a state does not hold: --to merged has both",
                *(file.path, peft.method_of(file.peft.config)),
            )
        states = {name: x.float() for name, x in _states(file, given.load_state).items()}
        if to == "state":
            content = io.BytesIO()
            torch.save(states, content)
            write_whole(path, content.getbuffer())
        else:
            largest = max(float(x.abs().max()) for x in states.values())
            if largest > torch.finfo(torch.float16).max:
                raise UserError(f"{file.path}: a state of {largest:.3g} has no place in fp16, in which ai00 keeps it")
            half = {name: x.transpose(1, 2).half().contiguous() for name, x in states.items()}
            write_whole(path, save(half, {"format": "pt"}))
    say(f"{path}\n")
    return 0


def _name(to: str, stem: str, load_model: str | None) -> str:
    """Of the file to be written, by the stem of the mission file's name; empty where it is a folder."""
    if to == "merged":
        return f"{Path(load_model).stem}-{stem}.pth"
    return {"state": f"{stem}-state.pth", "ai00": f"{stem}-state.st"}.get(to, "")


def _states(file: MissionFile, load_state: str | None) -> dict[str, Tensor]:
    """Of a mission file, or of a file of states that go in their place, under their names in a language model."""
    states = {name: x for name, x in file.tensors.items() if name.endswith("time_state")}
    if load_state:
        states = read_states(load_state, file.n_layer, tuple(next(iter(states.values())).shape))
    return {name.partition(".")[2]: x for name, x in states.items()}


def _write_merged(path: Path, file: MissionFile, options: Options) -> None:
    """The language model with what was trained in its weights.

    The file that it comes from is mapped; what changes is computed in fp32, matrix by matrix, and waits on the disk.
    """
    sizes, tensors = read_weights(options.model.load_model)
    quant = options.model.quant or file.info.get("quant") or "none"
    states = _states(file, options.model.load_state)
    _check_states(states, sizes, file)
    beside = file.peft
    if options.model.load_peft:
        beside = peft.read(options.model.load_peft, options.model.peft_config or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".merging") as waiting:
        changed = _merged(sizes, tensors, beside, quant, Path(waiting))
        partial = path.with_name(f".{path.name[:50]}{PARTIAL}")
        try:
            with partial.open("wb") as opened:  # whose errors come through torch, as the context of its own
                torch.save(tensors | changed | {name: x.float() for name, x in states.items()}, opened)
            os.replace(partial, path)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        finally:
            partial.unlink(missing_ok=True)
    if sizes.generation == 7:
        log.info("the rwkv package leaves the states of an RWKV-7 file aside: there, --to state has what to start from")


def _merged(
    sizes: ModelSizes, tensors: Mapping[str, Tensor], beside: PeftWeights | None, quant: str, waiting: Path
) -> dict[str, Tensor]:
    """Those matrices that change, by their names; each is mapped from a file in the folder `waiting`."""
    model = lm.model_class(sizes.generation).from_tensors(sizes, dict(tensors), device="cpu", dtype=None)
    names = [name for name, x in model.named_modules() if isinstance(x, Linear)]
    if beside:
        peft.inject(model, beside.config, beside.tensors)
    changed = {}
    for name in names:
        layer = model.get_submodule(name)
        injected = hasattr(layer, "get_base_layer")
        if not injected and quant == "none":
            continue
        weight = (layer.get_base_layer() if injected else layer).weight.detach()
        dtype = tensors[f"{name}.weight"].dtype
        if quant != "none":  # what it was trained beside
            packed = quantise(weight, "int8" if name == "head" else quant)
            weight = dequantise(*packed, weight.shape[1])
        if injected:
            weight = peft.merged_weight(layer, weight)
        if hasattr(os, "posix_fallocate"):  # not on macOS; else a full disk ends the process when it is written to
            with (waiting / name).open("wb") as opened:
                os.posix_fallocate(opened.fileno(), 0, weight.numel() * dtype.itemsize)
        place = torch.from_file(str(waiting / name), shared=True, size=weight.numel(), dtype=dtype)
        changed[f"{name}.weight"] = place.view(weight.shape).copy_(weight)
    return changed


def _check_states(states: Mapping[str, Tensor], sizes: ModelSizes, file: MissionFile) -> None:
    shape = (sizes.n_head, sizes.head_size, sizes.head_size)
    generation = file.info.get("generation", sizes.generation)
    found = {tuple(x.shape) for x in states.values()}
    if generation != sizes.generation or len(states) != sizes.n_layer or found != {shape}:
        raise UserError(
            f"mission file {file.path} does not fit: states for an RWKV-{generation} of {len(states)} layers x "
            f"{min(found)}, but the language model is an RWKV-{sizes.generation} of {sizes.n_layer} x {shape}"
        )


def _write_for_hub(folder: Path, file: MissionFile, options: Options) -> None:
    """A folder that `hf upload` takes as it is, and `--adapter OWNER/NAME` reads."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} has files in it: name a new folder")
    info = without_folders(file.info)
    write_whole(folder / "README.md", model_card(file, info, options.project).encode())
    name = file.path.name if file.path.name.startswith("rwkv-adapter-") else f"rwkv-adapter-{file.path.name}"
    write_mission_file(folder / Path(name).with_suffix(".pth"), file.tensors, info, file.peft)
