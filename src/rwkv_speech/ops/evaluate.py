"""Evaluation: decode splits, score them as the mission asks, write summary and report."""

import hashlib
import logging
from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path
from typing import Any

from rich.console import Console

from rwkv_speech.data import librispeech
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.loading import reading
from rwkv_speech.data.sample import Row
from rwkv_speech.engine.evaluation import check_ids, evaluate_split, open_eval_run, write_json
from rwkv_speech.engine.lock import project_lock
from rwkv_speech.engine.machine import Machine, fit_to_machine, launched, make_fabric, peak_memory
from rwkv_speech.errors import UserError
from rwkv_speech.files import printable, writing
from rwkv_speech.mission_file import MissionFile
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops.common import (
    check_missions,
    check_model_file,
    chosen_mission_files,
    frozen_parts,
    load_model,
    load_splits,
    longest_pieces,
)
from rwkv_speech.options import Options
from rwkv_speech.scoring import SplitResult, score_table, summary, write_report
from rwkv_speech.speech.augmentation import ROBUSTNESS
from rwkv_speech.speech.identity import hash_tensors
from rwkv_speech.terminal import say

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
    files = chosen_mission_files(options) if fabric.is_global_zero else []
    bad_samples = BadSamples(options.data.on_bad_audio, options.project / "bad_audio.jsonl")
    splits = load_splits(options.data, options.data.eval_split, librispeech.EVAL_SPLITS, bad_samples=bad_samples)
    without_rows = bad_samples.count  # audio without a transcript
    names = {split: _file_name(split) for split in splits}
    for split, name in names.items():
        if [*names.values()].count(name) > 1:
            raise UserError(f"--eval_split: two of the splits would go to eval/{name}.jsonl: give each a --proj_dir")
        for rows in _by_mission(splits[split]).values():
            check_ids(rows)
    model = load_model(options.model, files, fabric.device, machine) if files else None
    if model:
        check_missions(chain(*splits.values()), model)
    folder = options.project / "eval"
    results: dict[str, SplitResult] = {}
    with launched(fabric), reading(), writing(folder):
        files = fabric.broadcast(files)  # by now training beside this may have removed them, or written others
        model = model or load_model(options.model, files, fabric.device, machine)
        max_audio_s = longest_pieces(model, options)
        if fabric.is_global_zero:
            bounds = max_audio_s if len(max_audio_s) > 1 else max_audio_s[model.task().name]
            settings = _settings(options, files, model, machine) | {"max_audio_s": bounds}
            open_eval_run(folder, settings, resume=options.resume)
        for split, perturbation in product(splits, (None, *(ROBUSTNESS if options.perturb else ()))):
            by_mission = _by_mission(splits[split], model.task().name)
            for mission, rows in by_mission.items():
                more = [mission] * (len(by_mission) > 1) + ([perturbation.name] if perturbation else [])
                records, left_out = evaluate_split(
                    model,
                    rows,
                    name="-".join([names[split], *more]).replace(" ", "-").replace("/", "-"),
                    task=model.task(mission),
                    perturbation=perturbation,
                    max_audio_s=max_audio_s[mission],
                    options=options,
                    fabric=fabric,
                    bad_samples=bad_samples,
                )
                if fabric.is_global_zero:
                    results[", ".join([split, *more])] = model.task(mission).mission.result(
                        records, left_out=left_out, peak_memory=peak_memory(fabric.device)
                    )
    if not fabric.is_global_zero:
        return 0
    write_json(folder / "summary.json", {"adapter": "+".join(str(file.path) for file in files)} | summary(results))
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


def _by_mission(rows: Iterable[Row], default: str = "") -> dict[str, list[Row]]:
    """The rows of each mission; `default` is that of rows which name none."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.mission or default, []).append(row)
    return found


def _settings(options: Options, files: Iterable[MissionFile], model: SpeechRWKV, machine: Machine) -> dict[str, Any]:
    """All that decides on the answer to a sample."""
    adapters = []
    for file in files:
        weights = hashlib.blake2b(digest_size=8)
        hash_tensors(weights, file.tensors)
        adapters.append(f"{file.path.name} ({weights.hexdigest()})")
    flat = options.flat()
    return {
        **{name: flat[name] for name in EVAL_SETTINGS},
        **{"adapter": " + ".join(adapters), "mission": " + ".join(model.tasks)},
        "labels": [task.labels for task in model.tasks.values()],
        "precision": machine.precision,
        **frozen_parts(model),
    }


def _file_name(split: str) -> str:
    """For the records of a split; of a path, the last part of the place that it leads to."""
    path = Path(split).expanduser()
    name = (path.name if path.name not in ("", "..") else path.resolve().name) or "root"
    return name.removesuffix(".jsonl").removesuffix(".json").strip()
