"""What the operations share: opening the model and the data."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from rwkv_speech.data.sample import Row
from rwkv_speech.data.sources import LIBRISPEECH, load_split
from rwkv_speech.engine.machine import Machine
from rwkv_speech.errors import UserError
from rwkv_speech.lm import wkv
from rwkv_speech.missions import get_mission
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import DataOptions, ModelOptions, Options
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.frame_cache import FrameCache
from rwkv_speech.speech.hub import encoder_folder
from rwkv_speech.trained import newest_mission_file

log = logging.getLogger("rwkv_speech")


def check_model_file(options: ModelOptions) -> None:
    """Names a wrong model file, encoder or mission before the data are looked for, which takes longer.

    Raises:
        UserError: there is no such file, folder or mission.
    """
    if options.mission:
        get_mission(options.mission)
    if options.encoder:
        encoder_folder(options.encoder)
    if not Path(options.load_model).expanduser().is_file():
        raise UserError(f"{options.load_model}: does not exist; expected RWKV weights, .pth or .safetensors")


def check_missions(rows: Iterable[Row], model: SpeechRWKV) -> None:
    """Checks that rows which name a mission name that of the model.

    Raises:
        UserError: the first one that names another.
    """
    for row in rows:
        if row.mission not in (None, model.mission.name):
            raise UserError(
                f"{row.id}: its mission is {row.mission!r}, but this run is of {model.mission.name!r}: "
                "give it a manifest of its own, and --mission"
            )


def chosen_adapter(options: Options) -> Path:
    """The mission file that is named, else the newest of the project.

    Raises:
        UserError: none is named, and the project has none.
    """
    named = options.model.adapter
    return Path(named).expanduser() if named else newest_mission_file(options.project)


def load_model(
    options: ModelOptions,
    adapter: str | Path | None,
    device: torch.device | str,
    machine: Machine,
    cache: FrameCache | None = None,
) -> SpeechRWKV:
    """The model of the options, with the trained parts of a mission file if one is named.

    Raises:
        UserError: a part that can't be read, parts that don't fit, or sizes other than those asked for.
    """
    wkv.set_backend(options.wkv)
    model = SpeechRWKV.from_pretrained(
        options.load_model,
        encoder=options.encoder,
        adapter=adapter,
        load_state=options.load_state,
        mission=options.mission,
        device=device,
        dtype=machine.dtype,
        downsample_k=options.downsample_k,
        adapter_hidden=options.adapter_hidden,
        load_encoder=cache.encoder if cache else SpeechEncoder.from_pretrained,
    )
    sizes = model.language_model.sizes
    for flag, given, actual in (("n_layer", options.n_layer, sizes.n_layer), ("n_embd", options.n_embd, sizes.n_embd)):
        if given is not None and given != actual:
            raise UserError(f"--{flag} {given}, but {options.load_model} has {actual}; leave the flag out")
    return model


def load_splits(
    options: DataOptions, asked: str | None, defaults: Sequence[str], *, join: bool = False
) -> dict[str, list[Row]]:
    """The rows of each split by its name: those asked for, joined by "+", else those of the defaults that are there.

    join: all of them as one split, named "all".

    Raises:
        UserError: see `load_split`.
    """
    names: list[str | None] = asked.split("+") if asked else [None]
    if not asked and options.data == LIBRISPEECH:
        root = Path(options.data_dir).expanduser() if options.data_dir else None
        here = [n for n in defaults if not root or (root / n).is_dir() or (root / "LibriSpeech" / n).is_dir()]
        names = list(defaults) if options.download else here or [None]
        if here and len(here) < len(defaults):
            log.info("of %s, %s holds %s", ", ".join(defaults), root, ", ".join(here))
    if join:
        names = ["+".join(name for name in names if name) or None]
    return {
        "all" if join or not name else name: load_split(
            name,
            data=options.data,
            data_dir=options.data_dir,
            audio_column=options.audio_column,
            text_column=options.text_column,
            download=options.download,
        )
        for name in names
    }
