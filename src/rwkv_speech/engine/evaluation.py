"""Decoding a split and keeping the record of it, in one process or several, in one go or several."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import SpeechDataset, loader
from rwkv_speech.data.sample import Row
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_whole
from rwkv_speech.missions.mission import Mission
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import Options
from rwkv_speech.scoring import EvalRecord, RecordWriter, read_records
from rwkv_speech.speech.augmentation import Perturbation

UNFINISHED = "unfinished"  # folder of what each process has written of the split at hand
SCORE_SECONDS = 2.0  # between two looks at the score so far
LEDGER = "evaluation.json"  # the settings, and the splits that are finished under them


def evaluate_split(
    model: SpeechRWKV,
    rows: Sequence[Row],
    *,
    name: str,
    perturbation: Perturbation | None,
    options: Options,
    fabric: Fabric,
    bad_samples: BadSamples,
) -> list[EvalRecord]:
    """Answers to the samples of a split, each exactly once over all processes.

    Every process writes its records as it goes; the first one then joins them to `eval/<name>.jsonl` in the project.
    What stands there of the evaluation that `open_eval_run` goes on with is not decoded again.

    Returns:
        All records, in the order of the rows, in the first process; an empty list in the others.
    """
    folder = options.project / "eval"
    parts = folder / UNFINISHED / name
    # All wait here for the first, so that none writes before it has read.
    done = fabric.broadcast(_earlier(folder, name, rows, model.mission) if fabric.is_global_zero else {})
    left = [row for row in rows if row.id not in done]
    batches = loader(
        SpeechDataset(
            left,
            sample_of=model.mission.sample,
            renderer=model.renderer,
            extract=model.speech_encoder.extract,
            transform=perturbation,
        ),
        batch_size=options.eval_bsz,
        shuffle=False,
        num_workers=options.data.num_workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    with (
        RecordWriter(parts / f"{fabric.global_rank}.jsonl") as writer,
        _Progress(name, model.mission, total=len(rows), records=list(done.values()), fabric=fabric) as progress,
    ):
        for batch in batches:
            bad_samples.add(batch.bad)
            start = time.perf_counter()
            results = model.decode(batch.to(model.device), options.decoding) if len(batch) else []
            wall = (time.perf_counter() - start) / max(1, len(batch))
            for index, seconds, result in zip(batch.indices, batch.seconds, results, strict=True):
                record = model.mission.record(
                    left[index],
                    model.text(result),
                    seconds=seconds,
                    score=result.average_log_prob,
                    probability=result.probability,
                    loop=result.loop,
                    wall_seconds=wall,
                )
                writer.write(record)
                progress.add(record)
            progress.advance(len(batch) + len(batch.bad))
    fabric.barrier()
    if not fabric.is_global_zero:
        return []
    found = done | _by_id(parts.iterdir())
    records = [found[row.id] for row in rows if row.id in found]
    write_whole(folder / f"{name}.jsonl", b"".join(record.line() for record in records))
    _note_finished(folder, name)
    shutil.rmtree(parts)
    if not any(parts.parent.iterdir()):
        parts.parent.rmdir()
    return records


def open_eval_run(folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Begins an evaluation in a folder, or goes on with the one that is there.

    Only records written since it began count from here on, so that no sample is scored with what another model or an
    earlier evaluation made of it.

    Raises:
        UserError: `resume`, but what is there comes from other settings.
    """
    path = folder / LEDGER
    if resume and path.exists():
        before = json.loads(path.read_text())["settings"]
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            differs = ", ".join(f"{name} was {before.get(name)}, is {settings[name]}" for name in changed)
            raise UserError(f"--resume, but the evaluation in {folder} is another one: {differs}; leave --resume out")
        return
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    write_json(path, {"settings": settings, "finished": []})


def check_ids(rows: Iterable[Row]) -> None:
    """Raises a UserError where two rows have one id: records would be taken for each other."""
    counts = Counter(row.id for row in rows)
    id, times = counts.most_common(1)[0]
    if times > 1:
        raise UserError(f"utterance id {id!r} occurs {times} times in a split; ids must be unique")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes under a temporary name and renames."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _earlier(folder: Path, name: str, rows: Sequence[Row], mission: Mission) -> dict[str, EvalRecord]:
    """What has been written of these rows since the evaluation began."""
    finished = name in json.loads((folder / LEDGER).read_text())["finished"]
    found = _by_id([folder / f"{name}.jsonl"] if finished else (folder / UNFINISHED / name).glob("*.jsonl"))
    expected = {row.id: mission.record(row, "", seconds=0.0) for row in rows}
    measured = {
        "hypothesis": "",
        "seconds": 0.0,
        "score": None,
        "probability": None,
        "loop": False,
        "wall_seconds": None,
    }
    return {id: record for id, record in found.items() if replace(record, **measured) == expected.get(id)}


def _by_id(paths: Iterable[Path]) -> dict[str, EvalRecord]:
    return {record.id: record for path in sorted(paths) for record in read_records(path)}


def _note_finished(folder: Path, name: str) -> None:
    ledger = json.loads((folder / LEDGER).read_text())
    write_json(folder / LEDGER, ledger | {"finished": sorted({*ledger["finished"], name})})


class _Progress:
    """A bar with the leading score of the records so far; of several processes, the first one shows its own.

    records: what there is already.
    """

    def __init__(self, name: str, mission: Mission, *, total: int, records: list[EvalRecord], fabric: Fabric) -> None:
        self._mission, self._records, self._processes = mission, records, fabric.world_size
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        score = TextColumn("{task.fields[score]}")
        self._bar = Progress(*columns, score, console=Console(stderr=True), disable=not fabric.is_global_zero)
        self._task = self._bar.add_task(name, total=total, completed=len(records), score="")
        self._scored = -SCORE_SECONDS

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, record: EvalRecord) -> None:
        self._records.append(record)

    def advance(self, samples: int) -> None:
        self._bar.update(self._task, advance=samples * self._processes)
        if self._records and not self._bar.disable and time.monotonic() - self._scored > SCORE_SECONDS:
            leading = self._mission.score(self._records).leading
            self._bar.update(self._task, score=f"{leading.kind.label} {leading.kind.text(leading.value, 1)}")
            self._scored = time.monotonic()
