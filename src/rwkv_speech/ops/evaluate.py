"""Evaluation: decode splits, score them as the mission asks, write summary and report."""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

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
from rwkv_speech.lm import peft
from rwkv_speech.mission_file import MissionFile, trained_digest
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops.common import (
    check_missions,
    check_model_file,
    chosen_mission_files,
    frozen_parts,
    load_model,
    load_splits,
    longest_pieces,
    missions_of,
)
from rwkv_speech.options import Options
from rwkv_speech.scoring import SplitResult, score_table, summary, write_report
from rwkv_speech.speech.augmentation import ROBUSTNESS, Perturbation
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
    lines = _lines(splits, options)
    for line in lines:
        check_ids(line.rows)
        if [other.name for other in lines].count(line.name) > 1:
            raise UserError(
                f"--eval_split: two of the splits would go to eval/{line.name}.jsonl: give each split a --proj_dir"
            )
    model = load_model(options.model, files, fabric.device, machine) if files else None
    if model:
        check_missions(chain(*splits.values()), model)
        if len(model.tasks) > 1 and any(row.mission is None for row in chain(*splits.values())):
            missions = ", ".join(model.tasks)
            raise UserError(f"rows name no mission, and there are mission files of {missions}: name one by --mission")
    folder = options.project / "eval"
    results: dict[str, SplitResult] = {}
    with launched(fabric), reading(), writing(folder):
        files = fabric.broadcast(files)  # by now training beside this may have removed them, or written others
        model = model or load_model(options.model, files, fabric.device, machine)
        max_audio_s = longest_pieces(model, options)
        if fabric.is_global_zero:
            bounds = max_audio_s if len(max_audio_s) > 1 else max_audio_s[model.task().name]
            digests = _digests(options, files, model)
            settings = _settings(options, files, model, machine, digests) | {"max_audio_s": bounds}
            open_eval_run(folder, settings, resume=options.resume)
        for line in lines:
            task = model.task(line.mission)
            records, left_out = evaluate_split(
                model,
                line.rows,
                name=line.name,
                task=task,
                perturbation=line.perturbation,
                max_audio_s=max_audio_s[task.name],
                options=options,
                fabric=fabric,
                bad_samples=bad_samples,
            )
            if fabric.is_global_zero:
                memory = peak_memory(fabric.device)
                results[line.title] = task.mission.result(records, left_out=left_out, peak_memory=memory)
    if not fabric.is_global_zero:
        return 0
    of_what = {"adapter": "+".join(str(file.path) for file in files), "trained_weights": "+".join(digests)}
    write_json(folder / "summary.json", of_what | summary(results))
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


class _Line(NamedTuple):
    """A line of the report: its title, and the name of its records' file."""

    title: str
    name: str
    rows: list[Row]
    mission: str | None
    """None: that of the model, which has one."""
    perturbation: Perturbation | None


def _lines(splits: Mapping[str, list[Row]], options: Options) -> list[_Line]:
    """Each split, or each mission of one that has several, and each of these with every perturbation asked for."""
    lines = []
    for split, perturbation in product(splits, (None, *(ROBUSTNESS if options.perturb else ()))):
        missions = missions_of(splits[split])
        named = [mission for mission in missions if mission]
        for mission in missions if len(named) > 1 else (named or [None]):
            rows = [row for row in splits[split] if len(named) < 2 or row.mission == mission]
            more = [str(mission)] * (len(named) > 1) + ([perturbation.name] if perturbation else [])
            name = "-".join([_file_name(split), *more]).replace(" ", "-").replace("/", "-")
            lines.append(_Line(", ".join([split, *more]), name, rows, mission, perturbation))
    return lines


def _digests(options: Options, files: Sequence[MissionFile], model: SpeechRWKV) -> list[str]:
    """Of what is trained for each task, with what --load_state and --load_peft put in the place of its own."""
    chosen, given = options.model.load_peft, options.model.peft_config
    beside = peft.read(chosen, given or {}) if chosen else files[0].peft
    return [trained_digest(model.trainable_state_dict(task), beside) for task in model.tasks]


def _settings(
    options: Options, files: Sequence[MissionFile], model: SpeechRWKV, machine: Machine, digests: Sequence[str]
) -> dict[str, Any]:
    """All that decides on the answer to a sample."""
    adapters = [f"{file.path.name} ({digest})" for file, digest in zip(files, digests, strict=True)]
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
