"""All settings of a run: from the command line or from Python, checked together."""

import argparse
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from rwkv_speech.errors import UserError
from rwkv_speech.options.flags import flag, positive, seconds
from rwkv_speech.options.groups import (
    GROUPS,
    DataOptions,
    DecodingOptions,
    LiveOptions,
    MachineOptions,
    ModelOptions,
    ServingOptions,
    TrainingOptions,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one run of `train.py` is asked to do. `None` means: not given, the program decides."""

    op: str = flag(
        "train",
        "what to do",
        choices=("train", "eval", "predict", "chat", "live", "serve", "score", "export"),
    )
    proj_dir: str = flag("output", "folder for mission files, checkpoints and scores")
    model: ModelOptions
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    live: LiveOptions = field(default_factory=LiveOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)
    serving: ServingOptions = field(default_factory=ServingOptions)
    log_every: float = flag(
        30.0, "seconds between lines of progress in a log; a terminal has bars", type=seconds, resume_ignored=True
    )
    eval_bsz: int = flag(8, "utterances decoded together", type=positive, resume_ignored=True)
    perturb: bool = flag(
        False, "eval: each split also at 0.9 and 1.1 speed, and in white noise at 20, 10 and 0 dB", resume_ignored=True
    )
    resume: bool = flag(False, "eval: go on where an interrupted evaluation stopped", resume_ignored=True)
    file_path: list[str] | None = flag(
        None,
        "predict: audio files, folders or globs; live: one file, or - for raw 16-bit samples at 16 kHz on standard "
        "input (default: the microphone)",
        op=("predict", "live"),
        nargs="+",
    )
    max_audio_s: float | None = flag(
        None,
        "eval, predict, chat, live, serve: seconds; longer audio is cut in pauses of speech and joined again, or "
        "refused where the mission does not go piece by piece (default: the longest that the mission file was trained "
        "on, or 30)",
        type=float,
        resume_ignored=True,
    )
    format: str = flag(
        "text",
        "predict: lines of text, or with times: JSON lines, subtitles; live: text, or all that is shown as JSON lines",
        choices=("text", "json", "srt", "vtt"),
        resume_ignored=True,
    )
    output_dir: str | None = flag(
        None,
        "predict: folder for a transcript file for each audio file, else all goes to standard output; score: folder "
        "for a summary and a report; export: folder for what it writes (default: export in proj_dir)",
        op=("predict", "score", "export"),
    )
    to: str | None = flag(
        None,
        "export: what to write: merged, a language model file with states and LoRA in it; state, initial states for "
        "RWKV-Runner and the rwkv package; ai00, the same for web-rwkv; hub, a folder for hf upload",
        op="export",
        choices=("merged", "state", "ai00", "hub"),
    )
    prompt: str | None = flag(None, "predict: typed text before each recording, of the mission answer", op="predict")
    records: list[str] | None = flag(None, "score: files that evaluation left in eval/", op="score", nargs="+")
    normalizer: str | None = flag(
        None,
        "score: how transcripts are normalised (default: language, Whisper's English normaliser for English, its basic "
        "one elsewhere)",
        op="score",
        choices=("language", "english", "basic", "none"),
    )

    def __post_init__(self) -> None:
        """Checks what concerns several groups; each group has checked itself."""
        given = self.flat()
        for _, f in setting_fields():
            if given[f.name] != f.default and not goes_with(f, self.op):
                raise UserError(f"--{f.name} goes with --op {' or '.join(f.metadata['ops'])}, not {self.op}")
        if self.op == "train" and self.training.early_stop and not self.data.valid_split:
            raise UserError(
                f"--early_stop {self.training.early_stop} counts validations: name a split for them by --valid_split"
            )
        if self.op == "export" and not self.to:
            raise UserError("--op export needs --to: merged, state, ai00 or hub")
        if (self.op not in ("score", "export") or self.to == "merged") and not self.model.load_model:
            raise UserError("--load_model is required; python train.py --help lists the flags")
        if self.op == "score" and not self.records:
            raise UserError("--op score needs --records: one or more files that evaluation left in eval/")
        if self.op == "predict" and not self.file_path:
            raise UserError("--op predict needs --file_path: one or more audio files, folders or globs")
        if self.op == "live" and len(self.file_path or [""]) > 1:
            raise UserError(f"--op live takes one file, not {len(self.file_path)}: predict takes several")
        if self.op == "live" and self.format not in ("text", "json"):
            raise UserError(
                f"--format {self.format} is of whole recordings: --op predict; --op live writes text or json"
            )
        if self.max_audio_s is not None and not 1 <= self.max_audio_s < math.inf:
            raise UserError(f"--max_audio_s {self.max_audio_s:g}: expected seconds, at least 1")
        if self.model.peft_config and not (self.model.load_peft or self.training.peft_method):
            raise UserError("--peft_config goes with a method of peft in --train_type, or with --load_peft")
        if self.data.cache_features and self.training.noise_dir:
            raise UserError(
                "--noise_dir changes the audio in each epoch, so there are no frames for --cache_features to keep: "
                "leave one of them out; --speed_perturb and --spec_augment go with it"
            )

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> "Options":
        """Options from the command line and, if `--from_environment` is on it, from variables; flags win over these.

        Raises:
            UserError: an unknown flag, a value that a flag doesn't take, or flags that contradict each other.
        """
        parser = _Parser(
            prog="train.py",
            usage="train.py --load_model FILE [flags]",
            description="Speech for a frozen RWKV language model: train an adapter and an initial state, use them.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        groups: dict[str | None, argparse._ArgumentGroup] = {None: parser.add_argument_group("run")}
        for group, f in setting_fields():
            if group not in groups:
                groups[group] = parser.add_argument_group(group)
            how = {"action": "store_true"} if f.default is False else dict(f.metadata["argparse"])
            said = any(f.default is value for value in (None, False, MISSING))  # then the help says it in words
            how["default"] = argparse.SUPPRESS if said else f.default
            groups[group].add_argument(f"--{f.name}", help=f.metadata["help"], **how)
        text = "take settings also from environment variables of their names, as the launchers do; flags win"
        groups[None].add_argument("--from_environment", help=text, action="store_true", default=argparse.SUPPRESS)
        arguments = sys.argv[1:] if arguments is None else arguments
        found = parser.parse_args(arguments)
        if "from_environment" in found:
            found = parser.parse_args([*environment_flags(found.op, environment), *arguments])
            del found.from_environment
        return cls.of(**vars(found))

    @classmethod
    def of(cls, **settings: Any) -> "Options":
        """Options from flat names, as the command line has them: `Options.of(load_model="m.pth", beam=4)`."""
        own: dict[str, Any] = {}
        grouped: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
        places = {f.name: group for group, f in setting_fields()}
        for name, value in settings.items():
            if name not in places:
                raise TypeError(f"no setting {name!r}")
            group = places[name]
            (own if group is None else grouped[group])[name] = value
        return cls(**own, **{name: GROUPS[name](**values) for name, values in grouped.items()})

    def flat(self, *, resume_ignored: bool = True) -> dict[str, Any]:
        """Every setting by its name on the command line.

        resume_ignored: with those under which an interrupted training run may go on, too.
        """
        return {
            f.name: getattr(self if group is None else getattr(self, group), f.name)
            for group, f in setting_fields()
            if resume_ignored or not f.metadata["resume_ignored"]
        }

    @property
    def project(self) -> Path:
        return Path(self.proj_dir).expanduser()


def setting_fields() -> Iterator[tuple[str | None, Field]]:
    """The fields that are settings, each with the name of its group, None for those of `Options` itself."""
    for f in fields(Options):
        if f.metadata:
            yield None, f
    for group, kind in GROUPS.items():
        yield from ((group, f) for f in fields(kind) if f.metadata)


def goes_with(setting: Field, op: str) -> bool:
    return not setting.metadata["ops"] or op in setting.metadata["ops"]


def environment_flags(op: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The flags of an operation for which there are environment variables of the same names.

    An empty variable is as good as none, and so is a switch of 0. The operation itself isn't taken from `op`.
    """
    flags = []
    for _, f in setting_fields():
        value = environment.get(f.name)
        if not value or f.name == "op" or not goes_with(f, op):
            continue
        if f.default is not False:
            flags.append(f"--{f.name}={value}")
        elif value != "0":
            flags.append(f"--{f.name}")
    return flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; python train.py --help lists the flags")
