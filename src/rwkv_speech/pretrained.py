"""Puts a `SpeechRWKV` together from files: the frozen parts, and mission files."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rwkv_speech import lm
from rwkv_speech.errors import UserError
from rwkv_speech.lm import peft
from rwkv_speech.lm.language_model import LanguageModel
from rwkv_speech.lm.peft import PeftWeights
from rwkv_speech.mission_file import (
    MissionFile,
    MissionFileError,
    chosen_encoder,
    read_mission_file,
    read_states,
)
from rwkv_speech.missions import MISSIONS
from rwkv_speech.missions.task import Task
from rwkv_speech.options import QUANTS
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.frame_cache import AbsentEncoder
from rwkv_speech.speech.hub import encoder_folder
from rwkv_speech.trained import ADAPTER, STATE

if TYPE_CHECKING:
    from rwkv_speech.model import SpeechRWKV

log = logging.getLogger("rwkv_speech")

DEFAULT_ENCODER = "microsoft/wavlm-large"
DOWNSAMPLE_K = 5
ADAPTER_HIDDEN = 2048

GivenFile = str | Path | MissionFile


def load(
    kind: type["SpeechRWKV"],
    load_model: str | Path,
    *,
    encoder: str | None = None,
    adapter: GivenFile | Sequence[GivenFile] | None = None,
    load_state: str | Path | None = None,
    mission: str | Sequence[str] | None = None,
    share_adapter: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quant: str | None = None,
    load_peft: str | Path | None = None,
    peft_config: Mapping[str, Any] | None = None,
    merge: bool | None = None,
    downsample_k: int | None = None,
    adapter_hidden: int | None = None,
    load_encoder: Callable[..., SpeechEncoder | AbsentEncoder] = SpeechEncoder.from_pretrained,
) -> "SpeechRWKV":
    """Loads the frozen parts, and the trained ones from mission files.

    Args:
        kind: the class of the model.
        load_model: an RWKV-6 or RWKV-7 weight file, .pth or .safetensors.
        encoder: a Hugging Face name or folder; None is the one that the mission files name, or WavLM-large.
        adapter: a mission file or several, or what was read of them; None starts from torch's initialisation of the
            adapter and the model's own initial state (zero, unless its file holds one).
        load_state: a file of initial states alone, as RWKV-PEFT writes it; they replace those of `adapter`.
        mission: what is asked of the model, one or several; None is what the mission files name, or "transcribe". One
            that no file is of starts from the first.
        share_adapter: whether all missions have one adapter; None: those whose files hold the same one.
        device: where to compute.
        dtype: of the frozen parts and of computation; None is that of the model's file. Trained weights are fp32.
        quant: how the language model's large matrices are kept: "none", in `dtype`, or "int8" or "nf4", packed as
            `lm.quantised` does it; None is as the mission files say, or "none".
        load_peft: a folder in the form of the library peft, or a LoRA file of RWKV-PEFT; in place of what lies beside
            `adapter`.
        peft_config: of such a LoRA file, `{"lora_alpha": ...}`.
        merge: whether LoRA and its kin go into the language model's weights, in which they decode fastest, but are no
            longer there to be trained or written; None: unless these are packed, since merging would unpack them.
        downsample_k: encoder frames to a position; None is what the mission files say, or 5.
        adapter_hidden: hidden units of the adapter; None is what the mission files say, or 2048.
        load_encoder: called as `SpeechEncoder.from_pretrained` is; `FrameCache.encoder` where frames are cached.

    Raises:
        UserError: a file or encoder that can't be read, or parts that don't fit each other.
    """
    if peft_config and load_peft is None:
        raise UserError("peft_config is of a LoRA file of RWKV-PEFT: name that by load_peft")
    given = adapter if isinstance(adapter, Sequence) and not isinstance(adapter, str) else [adapter] * bool(adapter)
    files = [file if isinstance(file, MissionFile) else read_mission_file(file) for file in given]
    asked = [mission] if isinstance(mission, str) else list(mission or ())
    names = asked or [file.mission for file in files] or ["transcribe"]
    of_mission = {file.mission: file for file in files}
    if len(set(asked)) < len(asked):
        raise UserError(f"of the missions {', '.join(asked)}, two are the same")
    for name, file in of_mission.items():
        if name in names and name.partition("/")[0] not in MISSIONS:
            raise MissionFileError(f"mission file {file.path} names the mission {name!r}, which is not known here")
    if len(of_mission) < len(files):
        raise UserError(f"of {', '.join(str(file.path) for file in files)}, two are of one mission: leave one out")
    for file in files:
        encoder = chosen_encoder(file, encoder)
    encoder = encoder or DEFAULT_ENCODER
    encoder_folder(encoder)  # a wrong one is named at once, not when a large model has been read
    language_model = lm.load(load_model, device=device, dtype=dtype, quant=_chosen_quant(files, quant))
    with torch.random.fork_rng([]):  # a new adapter is the same, whether the encoder needs loading or not
        speech_encoder = load_encoder(encoder, device=device, dtype=language_model.dtype)
    for file in files:
        _check_fit(file, language_model, speech_encoder, downsample_k, adapter_hidden)
    ks = {file.inputs // speech_encoder.width for file in files} or {downsample_k or DOWNSAMPLE_K}
    if len(ks) > 1:
        raise UserError(f"the mission files stack {' and '.join(map(str, sorted(ks)))} frames: they can't go together")

    # A task has the file of its mission, or the first.
    sources = [of_mission.get(name) or files[0] for name in names] if files else [None] * len(names)
    alike = all(file.has_adapter_of(files[0]) for file in files)
    if share_adapter and not alike:
        raise UserError("the mission files hold different adapters, which can't be shared: give --share_adapter 0")
    adapters = []
    for file in sources[:1] if (alike if share_adapter is None else share_adapter) else sources:
        hidden = file.hidden if file else adapter_hidden or ADAPTER_HIDDEN
        adapters.append(Adapter(speech_encoder.width, language_model.sizes.n_embd, downsample_k=max(ks), hidden=hidden))
    tasks = [
        Task(
            name,
            labels=file.info.get("labels") if file and file.mission == name else None,
            trained_audio_s=file.trained_audio_s if file else None,
        )
        for name, file in zip(names, sources, strict=True)
    ]
    model = kind(language_model, speech_encoder, *(adapter.to(device) for adapter in adapters), tasks=tasks)
    for name, file in zip(names, sources, strict=True):
        if file:
            model.load_trained(file.tensors, name)
    beside_model = peft.read(load_peft, peft_config or {}) if load_peft is not None else _peft_of(files)
    if beside_model:
        peft.inject(language_model, beside_model.config, beside_model.tensors)
        if merge or (merge is None and not language_model.quant):
            peft.merge(language_model)
    if load_state is not None:
        sizes = language_model.sizes
        states = read_states(load_state, sizes.n_layer, (sizes.n_head, sizes.head_size, sizes.head_size))
        for name in names:
            model.load_trained(states, name)
    return model


def _check_fit(
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


def _peft_of(files: Sequence[MissionFile]) -> PeftWeights | None:
    """What lies beside all of the mission files: there is one language model for all of them.

    Raises:
        MissionFileError: different things do.
    """
    for file in files[1:]:
        if file.peft is not files[0].peft and not (file.peft and file.peft.equals(files[0].peft)):
            raise MissionFileError(
                f"{files[0].path} and {file.path} change the language model differently, by what lies beside them in "
                "the form of peft: they can't go together"
            )
    return files[0].peft if files else None


def _chosen_quant(files: Sequence[MissionFile], asked: str | None) -> str | None:
    """How the language model is to be kept: as asked, else as it was when the mission files were trained.

    The log says where these differ.

    Raises:
        UserError: a name that is not known, or files that say different things.
    """
    of_file = {file.path: file.info.get("quant") or "none" for file in files}
    for path, quant in of_file.items():
        if quant not in ("none", *QUANTS):
            raise MissionFileError(f"mission file {path} was trained with the quant {quant!r}, which is not known here")
        if asked not in (None, quant):
            log.info("%s was trained beside a language model with the quant %s, not %s", path, quant, asked)
    if not asked and len({*of_file.values()}) > 1:
        said = ", ".join(f"{path}: {quant}" for path, quant in of_file.items())
        raise UserError(f"the mission files were trained with different quants ({said}): name one by --quant")
    chosen = asked or next(iter(of_file.values()), "none")
    if chosen not in ("none", *QUANTS):
        raise UserError(f"quant {chosen!r}: expected none, {' or '.join(QUANTS)}")
    return None if chosen == "none" else chosen
