"""What the operations share: opening the model and the data."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.sample import Row
from rwkv_speech.data.sources import LIBRISPEECH, load_split, split_names
from rwkv_speech.engine.machine import Machine
from rwkv_speech.errors import UserError
from rwkv_speech.lm import graphs, wkv
from rwkv_speech.mission_file import MissionFile, read_best_mission_files, read_mission_file
from rwkv_speech.missions import get_mission
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import DataOptions, ModelOptions, Options
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.frame_cache import AbsentEncoder, FrameCache
from rwkv_speech.speech.hub import encoder_folder
from rwkv_speech.speech.identity import encoder_identity, hash_sampled, hash_tensors

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
    """Checks that rows which name a mission name one of the model's.

    Raises:
        UserError: the first one that names another.
    """
    for row in rows:
        if row.mission is not None and row.mission not in model.tasks:
            raise UserError(
                f"{row.id}: its mission is {row.mission!r}, but this run is of {', '.join(map(repr, model.tasks))}: "
                "give it a manifest of its own, and --mission"
            )


def missions_of(rows: Iterable[Row]) -> list[str | None]:
    """The missions that rows name, each once, in their order; None where a row names none."""
    return list(dict.fromkeys(row.mission for row in rows))


def chosen_mission_files(options: Options) -> list[MissionFile]:
    """The mission files that are named, else the best of the project's newest run, read; the log says which.

    Of several, where a mission is asked for, its own.

    Raises:
        UserError: none is named and the project has none, they can't be read, or none is of the mission.
    """
    if named := named_mission_files(options.model):
        found = [(file, "as named") for file in named]
    else:
        found = read_best_mission_files(options.project)
    asked = options.model.mission
    if asked and len(found) > 1:
        names = [file.mission for file, _ in found]
        if asked not in names:
            raise UserError(f"--mission {asked}: the mission files are of {', '.join(names)}")
        found = [found[names.index(asked)]]
    for file, which in found:
        log.info("%s %s, %s", "evaluating" if options.op == "eval" else "using", file.path, which)
    return [file for file, _ in found]


def only_mission_file(options: Options) -> list[MissionFile]:
    """The one mission file that is named, or the best.

    Raises:
        UserError: as `chosen_mission_files`, or there are several.
    """
    files = chosen_mission_files(options)
    if len(files) > 1:
        names = ", ".join(file.mission for file in files)
        raise UserError(f"there are mission files of {names}: name one of these by --mission")
    return files


def named_mission_files(options: ModelOptions) -> list[MissionFile]:
    """Those of --adapter, read; none where it is not given.

    Raises:
        UserError: one can't be read.
    """
    return (
        [read_mission_file(name) for name in split_names(options.adapter, what="--adapter")] if options.adapter else []
    )


def load_model(
    options: ModelOptions,
    files: Sequence[MissionFile],
    device: torch.device | str,
    machine: Machine,
    cache: FrameCache | None = None,
    *,
    missions: Sequence[str] = (),
    share_adapter: bool | None = None,
    merge: bool | None = None,
) -> SpeechRWKV:
    """The model of the options, with the trained parts of mission files, if there are any.

    missions: where the options name none; none: the mission files'.
    share_adapter, merge: as for `from_pretrained`.

    Raises:
        UserError: a part that can't be read, parts that don't fit, or sizes or labels other than can be asked for.
    """
    wkv.set_backend(options.wkv)
    graphs.allow(bool(options.cuda_graphs))
    model = SpeechRWKV.from_pretrained(
        options.load_model,
        encoder=options.encoder,
        adapter=files,
        load_state=options.load_state,
        mission=missions or options.mission,
        share_adapter=share_adapter,
        device=device,
        dtype=machine.dtype,
        quant=options.quant,
        load_peft=options.load_peft,
        peft_config=options.peft_config if options.load_peft else None,
        merge=merge,
        downsample_k=options.downsample_k,
        adapter_hidden=options.adapter_hidden,
        load_encoder=cache.encoder if cache else SpeechEncoder.from_pretrained,
    )
    if options.labels:
        choosing = [task for task in model.tasks.values() if task.mission.chooses]
        if len(choosing) != 1:
            what = f"not {len(choosing)} of them" if choosing else f"not {', '.join(model.tasks)}"
            raise UserError(f"--labels goes with one mission that chooses among them, such as label, {what}")
        choosing[0].labels = options.labels
    sizes = model.language_model.sizes
    for flag, given, actual in (("n_layer", options.n_layer, sizes.n_layer), ("n_embd", options.n_embd, sizes.n_embd)):
        if given is not None and given != actual:
            raise UserError(f"--{flag} {given}, but {options.load_model} has {actual}; leave the flag out")
    return model


def longest_pieces(model: SpeechRWKV, options: Options) -> dict[str, float]:
    """Seconds of audio that are decoded in one go, for each mission; the log says how many, and why."""
    found = {}
    for name, task in model.tasks.items():
        found[name] = seconds = model.longest_piece(options.max_audio_s, name)
        learnt = seconds == task.trained_audio_s
        why = "--max_audio_s" if options.max_audio_s else "the longest of its training" if learnt else "the default"
        whose = f"{name}: " if len(model.tasks) > 1 else ""
        what = "cut in pauses" if task.mission.cut else "refused"
        log.info("%saudio of more than %.2f s is %s: %s", whose, seconds, what, why)
    return found


def frozen_parts(model: SpeechRWKV) -> dict[str, str | None]:
    """What stands for the weights of the frozen parts, by name; the language model's are sampled, as they are kept."""
    encoder = model.speech_encoder
    weights = {name: x for name, x in model.language_model.state_dict(keep_vars=True).items() if not x.requires_grad}
    return {
        "quant": model.language_model.quant,
        "load_model_weights": hash_sampled(weights),
        "encoder_weights": encoder.identity if isinstance(encoder, AbsentEncoder) else encoder_identity(encoder),
    }


def weights_that_stay(model: SpeechRWKV) -> dict[str, str]:
    """What stands for the weights that could learn and don't, as the adapter beside which a state is trained."""
    still = {name: x.parameter for name, x in model.trained_tensors().items() if not x.parameter.requires_grad}
    found = hashlib.blake2b(digest_size=8)
    hash_tensors(found, still)
    return {"weights_that_stay": found.hexdigest()} if still else {}


def load_splits(
    options: DataOptions,
    asked: str | None,
    defaults: Sequence[str],
    *,
    bad_samples: BadSamples,
    join: bool = False,
) -> dict[str, list[Row]]:
    """The rows of each split by its name: those asked for, joined by "+", else those of the defaults that are there.

    bad_samples: takes what a folder in LibriSpeech's layout holds that can't be used.
    join: all of them as one split, named "all".

    Raises:
        UserError: see `load_split`.
    """
    names: list[str | None] = split_names(asked, options.data_dir or options.data) if asked else [None]
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
            bad_audio=bad_samples,
        )
        for name in names
    }
