"""Scoring again: the records of evaluations, without a model."""

from pathlib import Path

from rich.console import Console

from rwkv_speech.engine.evaluation import write_json
from rwkv_speech.errors import UserError
from rwkv_speech.missions import get_mission
from rwkv_speech.options import Options
from rwkv_speech.scoring import SplitResult, read_records, score_table, summary, write_report


def score(options: Options) -> int:
    """Scores files of records as their missions do; summary and report go to `output_dir`, where given."""
    results: dict[str, SplitResult] = {}
    for path in map(Path, options.records or ()):
        if not path.is_file():
            raise UserError(f"--records {path}: no such file; expected one that evaluation left in eval/")
        name = str(path) if path.stem in results else path.stem
        results[name] = _result(path, options)
    if options.output_dir:
        folder = Path(options.output_dir).expanduser()
        write_json(folder / "summary.json", summary(results))
        write_report(folder / "report.html", results)
    Console().print(score_table(results))
    for name, result in results.items():
        print(f"{name}: {result.scores.headline}")
    return 0


def _result(path: Path, options: Options) -> SplitResult:
    records = read_records(path)
    missions = {record.mission or "transcribe" for record in records}  # without one, of an earlier version
    if not options.model.mission and len(missions) > 1:
        raise UserError(f"{path}: records of several missions, {', '.join(sorted(missions))}: name one by --mission")
    mission = get_mission(options.model.mission or min(missions, default="transcribe"))
    if not options.normalizer:
        return mission.result(records)
    if mission.name != "transcribe":
        raise UserError(
            f"--normalizer {options.normalizer}: only transcripts are normalised, not the mission {mission.name}"
        )
    return mission.result(records, normalizer=options.normalizer)
