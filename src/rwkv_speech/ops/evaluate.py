"""Evaluation: decode splits, score them as the mission asks, write summary and report."""

import hashlib
import logging
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from rwkv_speech.data import librispeech
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.loading import reading
from rwkv_speech.engine.evaluation import check_ids, evaluate_split, open_eval_run, write_json
from rwkv_speech.engine.lock import project_lock
from rwkv_speech.engine.machine import Machine, fit_to_machine, launched, make_fabric, peak_memory
from rwkv_speech.errors import UserError
from rwkv_speech.files import printable, writing
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops.common import (
    check_missions,
    check_model_file,
    chosen_mission_file,
    frozen_parts,
    load_model,
    load_splits,
    longest_piece,
)
from rwkv_speech.options import Options
from rwkv_speech.scoring import SplitResult, score_table, summary, write_report
from rwkv_speech.speech.augmentation import ROBUSTNESS, Perturbation
from rwkv_speech.speech.identity import hash_tensors
from rwkv_speech.terminal import say
from rwkv_speech.trained import MissionFile

log = logging.getLogger("rwkv_speech")

# Settings that change what an evaluation finds: it is not resumed under others. What it hears is looked at for itself.
EVAL_SETTINGS = ("beam", "temperature", "top_p", "sampling_seed", "max_new_tokens", "loop_guard")


def evaluate(options: Options) -> int:
    """Measures the scores of splits; records, summary and report go to `eval/` in the project."""
    check_model_file(options.model)
    machine = fit_to_machine(options.machine)
    with project_lock(options.project, "evaluation"):
        return _evaluate(options, machine)


def _evaluate(options: Options, machine: Machine) -> int:
    fabric = make_fabric(machine)
    file = chosen_mission_file(options) if fabric.is_global_zero else None
    bad_samples = BadSamples(options.data.on_bad_audio, options.project / "bad_audio.jsonl")
    splits = load_splits(options.data, options.data.eval_split, librispeech.EVAL_SPLITS, bad_samples=bad_samples)
    without_rows = bad_samples.count  # audio without a transcript
    perturbations = (None, *(ROBUSTNESS if options.perturb else ()))
    lines = {f"{name}, {x.name}" if x else name: (name, x) for name in splits for x in perturbations}
    files = _file_names(lines)
    for rows in splits.values():
        check_ids(rows)
    model = load_model(options.model, file, fabric.device, machine) if file else None
    if model:
        check_missions(chain(*splits.values()), model)
    folder = options.project / "eval"
    results: dict[str, SplitResult] = {}
    with launched(fabric), reading(), writing(folder):
        file = fabric.broadcast(file)  # by now training beside this may have removed it, or written another one
        model = model or load_model(options.model, file, fabric.device, machine)
        max_audio_s = longest_piece(model, options, file)
        if fabric.is_global_zero:
            open_eval_run(
                folder, _settings(options, file, model, machine) | {"max_audio_s": max_audio_s}, resume=options.resume
            )
        for line, (name, perturbation) in lines.items():
            records, left_out = evaluate_split(
                model,
                splits[name],
                name=files[line],
                perturbation=perturbation,
                max_audio_s=max_audio_s,
                options=options,
                fabric=fabric,
                bad_samples=bad_samples,
            )
            if fabric.is_global_zero:
                results[line] = model.mission.result(records, left_out=left_out, peak_memory=peak_memory(fabric.device))
    if not fabric.is_global_zero:
        return 0
    write_json(folder / "summary.json", {"adapter": str(file.path)} | summary(results))
    write_report(folder / "report.html", results)
    console = Console()
    with console.capture() as table:
        console.print(score_table(results))
    headlines = [f"{printable(line)}: {result.scores.headline}\n" for line, result in results.items()]
    say(table.get() + "".join(headlines))
    left_out = without_rows + sum(result.cost.left_out for result in results.values())
    bad = f"{left_out} bad samples left out, listed in {bad_samples.path}" if left_out else "no bad samples"
    log.info("%s; %s holds hypotheses, summary.json and report.html", bad, folder)
    return 0


def _settings(options: Options, file: MissionFile, model: SpeechRWKV, machine: Machine) -> dict[str, Any]:
    """All that decides on the answer to a sample."""
    weights = hashlib.blake2b(digest_size=8)
    hash_tensors(weights, file.tensors)
    flat = options.flat()
    return {
        **{name: flat[name] for name in EVAL_SETTINGS},
        **{"adapter": f"{file.path.name} ({weights.hexdigest()})", "mission": model.mission.name},
        **{"labels": model.labels, "precision": machine.precision},
        **frozen_parts(model),
    }


def _file_names(lines: Mapping[str, tuple[str, Perturbation | None]]) -> dict[str, str]:
    """File names for the lines of an evaluation; that of a path is the last part of the place that it leads to."""
    names: dict[str, str] = {}
    for line, (split, perturbation) in lines.items():
        path = Path(split).expanduser()
        name = (path.name if path.name not in ("", "..") else path.resolve().name) or "root"
        name = name.removesuffix(".jsonl").removesuffix(".json")
        name = f"{name} {perturbation.name if perturbation else ''}".strip().replace(" ", "-")
        if name in names.values():
            raise UserError(f"--eval_split: two of the splits would go to eval/{name}.jsonl: give each a --proj_dir")
        names[line] = name
    return names
