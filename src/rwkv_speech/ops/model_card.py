"""The model card of a mission: what it is, what it goes with, how it was trained and how it scores, how to use it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from rwkv_speech.lm import peft
from rwkv_speech.mission_file import MissionFile, trained_digest
from rwkv_speech.options import TrainingOptions

_PLACES = ("noise_dir", "wandb")  # settings of training that name places of this machine


def without_folders(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON of a mission file says; of an encoder's folder on this machine, its name alone."""
    encoder = Path(str(info.get("encoder", "")))
    return {**info, "encoder": encoder.name} if encoder.is_absolute() else dict(info)


def model_card(file: MissionFile, info: Mapping[str, Any], project: Path) -> str:
    """A README.md with the head that the Hugging Face hub reads.

    file: the mission file.
    info: what its JSON will say.
    project: where it may have been trained and evaluated.
    """
    model, encoder = (info.get(name) or "not stated" for name in ("language_model", "encoder"))
    parts, trained = "An adapter and an initial state", sum(x.numel() for x in file.tensors.values())
    if file.peft:
        parts += f", and {peft.method_of(file.peft.config)} in the form of peft"
        trained += sum(x.numel() for x in file.peft.tensors.values())
    said = {"mission": file.mission, "language model": model, "speech encoder": encoder}
    named = {"generation": "generation of RWKV", "n_layer": "layers", "n_embd": "width", "quant": "packed into"}
    named |= {"labels": "labels", "step": "steps of training", "trained_audio_s": "longest audio in training, s"}
    said |= {title: info[name] for name, title in named.items() if info.get(name) is not None}
    said["labels"] = ", ".join(info.get("labels") or ())
    settings = _settings(info, project)
    example = f"""```python
from rwkv_speech import SpeechRWKV
model = SpeechRWKV.from_pretrained("{model}", encoder="{encoder}", adapter="OWNER/NAME")
print(model.transcribe(["a.flac"]))
```"""
    sections = [
        f"---\nlibrary_name: rwkv-speech\ntags: [rwkv, speech, {file.mission.partition('/')[0]}]\n---",
        f"# {file.mission}, for a frozen RWKV",
        f"{parts}: {trained:,} trained parameters beside a frozen language model and a frozen speech encoder.",
        _table({name: value for name, value in said.items() if value != ""}),
        "## Scores",
        _scores(file, project) or "Not evaluated.",
        *(["## Training", _table(settings)] if settings else []),
        "## Use",
        f"The language model is `{model}`; this project fetches the rest, under the name that it has on the hub:",
        example,
        f"```\npython train.py --op predict --load_model {model} --adapter OWNER/NAME --file_path a.flac\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _scores(file: MissionFile, project: Path) -> str:
    """Those of the project's evaluation, if it was of these weights, each with its interval of 95 %."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        summary = json.loads((project / "eval/summary.json").read_bytes())
        if summary["trained_weights"] != trained_digest(file.tensors, file.peft):
            return ""
        lines = ["| split | utterances | score | value | 95 % interval |", "|---|---|---|---|---|"]
        for split, found in summary["splits"].items():
            for metric in found["metrics"]:
                low, high = metric.get("interval") or ("", "")
                numbers = [f"{x:.4g}" if isinstance(x, float | int) else "" for x in (metric["value"], low, high)]
                row = [Path(split).name, str(found["utterances"]), metric["name"], numbers[0], " to ".join(numbers[1:])]
                lines.append(f"| {' | '.join(row)} |")
        return "\n".join(lines)
    return ""


def _settings(info: Mapping[str, Any], project: Path) -> dict[str, Any]:
    """How the run of a mission file was to train, where the project still says so."""
    for path in project.glob("checkpoints/run-*/run.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            run = json.loads(path.read_bytes())
            if run["id"] == info["run"]:
                names = [f.name for f in fields(TrainingOptions) if f.name not in _PLACES] + [
                    "peft_config",
                    "precision",
                ]
                return {name: run["options"][name] for name in names if run["options"].get(name) is not None}
    return {}


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows.items())])
