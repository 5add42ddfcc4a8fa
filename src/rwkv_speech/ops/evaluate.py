"""Evaluation: decode splits, score them as the mission asks, write summary and report."""

import logging
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from rich.console import Console

from rwkv_speech.data import librispeech
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.engine.evaluation import check_ids, evaluate_split, open_eval_run, write_json
from rwkv_speech.engine.machine import fit_to_machine, launched, make_fabric, peak_memory
from rwkv_speech.errors import UserError
from rwkv_speech.files import check_folder, writing
from rwkv_speech.ops.common import check_missions, check_model_file, chosen_adapter, load_model, load_splits
from rwkv_speech.options import Options
from rwkv_speech.scoring import SplitResult, score_table, summary, write_report
from rwkv_speech.speech.augmentation import ROBUSTNESS
from rwkv_speech.terminal import printable, say

log = logging.getLogger("rwkv_speech")

# Settings that change what an evaluation finds: it is not resumed under others.
EVAL_SETTINGS = (
    *("load_model", "load_state", "mission", "data", "data_dir", "audio_column", "text_column"),
    *("beam", "temperature", "top_p", "sampling_seed", "max_new_tokens", "loop_guard"),
)


def evaluate(options: Options) -> int:
    """Measures the scores of splits; records, summary and report go to `eval/` in the project."""
    check_model_file(options.model)
    machine = fit_to_machine(options.machine)
    adapter = chosen_adapter(options)
    log.info("evaluating %s", adapter)
    bad_samples = BadSamples(options.data.on_bad_audio, options.project / "bad_audio.jsonl")
    splits = load_splits(options.data, options.data.eval_split, librispeech.EVAL_SPLITS)
    perturbations = (None, *(ROBUSTNESS if options.perturb else ()))
    lines = {f"{name}, {x.name}" if x else name: (name, x) for name in splits for x in perturbations}
    files = _file_names(lines)
    for rows in splits.values():
        check_ids(rows)
    check_folder(options.project, "proj_dir")
    fabric = make_fabric(machine)
    model = load_model(options.model, adapter, fabric.device, machine)
    for rows in splits.values():
        check_missions(rows, model)
    folder = options.project / "eval"
    results: dict[str, SplitResult] = {}
    with launched(fabric), writing(folder):
        if fabric.is_global_zero:
            flat = options.flat()
            written = datetime.fromtimestamp(adapter.stat().st_mtime).isoformat()
            settings = {name: flat[name] for name in EVAL_SETTINGS} | {
                **{"adapter": str(adapter), "adapter_written": written},
                **{"encoder": model.speech_encoder.name, "precision": machine.precision},
            }
            open_eval_run(folder, settings, resume=options.resume)
        for line, (name, perturbation) in lines.items():
            records = evaluate_split(
                model,
                splits[name],
                name=files[line],
                perturbation=perturbation,
                options=options,
                fabric=fabric,
                bad_samples=bad_samples,
            )
            if fabric.is_global_zero:
                results[line] = model.mission.result(
                    records, left_out=len(splits[name]) - len(records), peak_memory=peak_memory(fabric.device)
                )
    if not fabric.is_global_zero:
        return 0
    write_json(folder / "summary.json", {"adapter": str(adapter)} | summary(results))
    write_report(folder / "report.html", results)
    console = Console()
    with console.capture() as table:
        console.print(score_table(results))
    headlines = [f"{printable(line)}: {result.scores.headline}\n" for line, result in results.items()]
    say(table.get() + "".join(headlines))
    left_out = sum(result.cost.left_out for result in results.values())
    bad = f"{left_out} bad samples left out, listed in {bad_samples.path}" if left_out else "no bad samples"
    log.info("%s; %s holds hypotheses, summary.json and report.html", bad, folder)
    return 0


def _file_names(lines: Iterable[str]) -> dict[str, str]:
    """File names for the lines of an evaluation; that of a path is its last part."""
    names: dict[str, str] = {}
    for line in lines:
        name = Path(line).name.replace(", ", "-").replace(" ", "-").removesuffix(".jsonl").removesuffix(".json")
        if name in names.values():
            raise UserError(f"--eval_split: two of the splits would go to eval/{name}.jsonl: give each a --proj_dir")
        names[line] = name
    return names
