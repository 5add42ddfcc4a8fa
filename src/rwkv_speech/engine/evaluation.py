"""Decoding a split and keeping the record of it, in one process or several, in one go or several."""

import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor

from rwkv_speech.answering import answer_rounds
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import SpeechDataset
from rwkv_speech.data.loading import loader
from rwkv_speech.data.sample import BadSample, Row, fingerprint
from rwkv_speech.decoding import DecodingResult
from rwkv_speech.engine.machine import gather
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_whole
from rwkv_speech.missions.mission import Mission
from rwkv_speech.missions.task import Task
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import Options
from rwkv_speech.progress import Progress
from rwkv_speech.scoring import EvalRecord, RecordWriter, read_records
from rwkv_speech.speech.audio import AudioError, Longest
from rwkv_speech.speech.augmentation import Perturbation
from rwkv_speech.transcription import Alternative, transcripts

log = logging.getLogger("rwkv_speech")

UNFINISHED = "unfinished"  # folder of what each process has written of the split at hand
LEDGER = "evaluation.json"  # the settings, and the splits that are finished under them


def evaluate_split(
    model: SpeechRWKV,
    rows: Sequence[Row],
    *,
    name: str,
    task: Task,
    perturbation: Perturbation | None,
    max_audio_s: float,
    options: Options,
    fabric: Fabric,
    bad_samples: BadSamples,
) -> tuple[list[EvalRecord], int]:
    """Answers to the samples of a split, all of one task, each exactly once over all processes.

    Recordings longer than `max_audio_s` are cut, and answered, as prediction does it; where the mission doesn't have
    them cut, they are bad samples.

    Every process writes its records as it goes; the first one then joins them to `eval/<name>.jsonl` in the project.
    What stands there of the evaluation that `open_eval_run` goes on with is not decoded again, where it was an answer
    to the same recording.

    Returns:
        All records, in the order of the rows, and how many samples could not be used, in the first process; no records
        in the others.

    Raises:
        UserError: a bad sample, as `bad_samples` says, nothing but such, or somebody else changed what this evaluation
            has written.
    """
    folder = options.project / "eval"
    parts = folder / UNFINISHED / name
    changes = perturbation.name if perturbation else None
    heard = {
        row.id: fingerprint(
            [row], model.sample, changes, row.language, row.target_language, row.answers, row.transcript
        )
        for row in rows
    }
    # All wait here for the first, so that none writes before it has read.
    done = fabric.broadcast(_earlier(folder, name, heard) if fabric.is_global_zero else {})
    left = [row for row in rows if row.id not in done]
    bad: set[str] = set()  # ids
    batches = loader(
        SpeechDataset(
            left,
            sample_of=model.sample,
            renderer=model.renderer,
            extract=model.speech_encoder.extract,
            transform=perturbation,
            longest=Longest(max_audio_s, "are answered in one go"),
            set_apart=task.mission.cut,
        ),
        batch_size=options.eval_bsz,
        shuffle=False,
        num_workers=options.data.num_workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    with (
        RecordWriter(parts / f"{fabric.global_rank}.jsonl") as writer,
        Progress(
            name, len(rows), done=len(done), log_every=options.log_every, visible=fabric.is_global_zero
        ) as progress,
    ):
        records = [*done.values()]  # of several processes, the first one shows the score of its own
        for batch in batches:
            bad_samples.add(batch.bad)
            bad.update(sample.id for sample in batch.bad)
            start = time.perf_counter()
            batch = batch.to(model.device)
            answers = answer_rounds(model, batch, options.decoding) if len(batch) else []
            wall = (time.perf_counter() - start) / max(1, len(batch))
            beside = [None] * len(batch)
            if task.mission.rounds and len(batch):
                beside = answer_rounds(model, batch, options.decoding, references=True)
            for index, seconds, rounds, others in zip(batch.indices, batch.seconds, answers, beside, strict=True):
                record = record_of(
                    *(model, left[index], rounds, others),
                    heard=heard[left[index].id],
                    seconds=seconds,
                    score=sum(x.score for x in rounds) / sum(x.n_scored for x in rounds),
                    probability=rounds[-1].probability,
                    loop=any(x.loop for x in rounds),
                    wall_seconds=wall,
                )
                writer.write(record)
                records.append(record)
            for index in batch.long:
                row = left[index]
                try:
                    record = answer_in_pieces(model, row, heard[row.id], perturbation, max_audio_s, options)
                except AudioError as error:
                    bad_samples.add([BadSample(row.id, str(row.audio), str(error))])
                    bad.add(row.id)
                else:
                    writer.write(record)
                    records.append(record)
            samples = len(batch) + len(batch.bad) + len(batch.long)
            progress.advance(fabric.world_size * samples, partial(_score, task.mission, records))
    bad = set().union(*gather(bad))  # when all have come to here
    if len(bad) == len(rows):
        raise UserError(f"{name}: none of its {len(rows)} samples can be used; {bad_samples.path} says why of each")
    if not fabric.is_global_zero:
        return [], len(bad)
    found = done | _records(parts.glob("*.jsonl"), heard)
    records = [found[row.id] for row in rows if row.id in found]
    if len(records) + len(bad) != len(rows):
        raise UserError(f"{parts} lacks records that this evaluation has written: evaluate again, with --resume")
    if cut := [record.details for record in records if "pieces" in record.details]:
        pieces, empty = (sum(details[what] for details in cut) for what in ("pieces", "empty_pieces"))
        log.info("%s: %d recordings were cut into %d pieces; %d of these gave no text", name, len(cut), pieces, empty)
    write_whole(folder / f"{name}.jsonl", b"".join(record.line() for record in records))
    _note_finished(folder, name)
    shutil.rmtree(parts)
    if not any(parts.parent.iterdir()):
        parts.parent.rmdir()
    return records, len(bad)


def record_of(
    model: SpeechRWKV,
    row: Row,
    answers: Sequence[DecodingResult],
    with_references: Sequence[DecodingResult] | None = None,
    **measured: Any,
) -> EvalRecord:
    """The record of a row; where its mission has several rounds, `details` hold all of them.

    answers: to each round, with the model's own answers in the state, and
    with_references: with the references to earlier rounds in the state, where that was tried.
    measured: what else `Mission.record` takes.
    """
    task = model.task(row.mission)
    record = task.record(row, model.text(answers[-1]), **measured)
    if not task.mission.rounds:
        return record
    references = ["".join(message.parts) for message in model.sample(row).messages if message.role == "assistant"]
    rounds = [
        {"round": number, "reference": reference, "hypothesis": model.text(answer)}
        for number, (reference, answer) in enumerate(zip(references, answers, strict=True), start=1)
    ]
    for found, answer in zip(rounds, with_references or (), strict=False):
        found["with_references"] = model.text(answer)
    return replace(record, details=record.details | {"rounds": rounds})


def answer_in_pieces(
    model: SpeechRWKV,
    row: Row,
    heard: str,
    perturbation: Perturbation | None,
    max_audio_s: float,
    options: Options,
) -> EvalRecord:
    """The record of a recording that is cut in its pauses; `details` count the pieces, and those without an answer.

    heard: the record's.

    Raises:
        AudioError: audio that can't be used.
    """
    results: list[DecodingResult] = []
    wall = 0.0

    def decode(waveforms: Sequence[Tensor]) -> list[list[Alternative]]:
        nonlocal wall
        ids = [f"{row.id} {len(results) + i}" for i in range(len(waveforms))]
        if perturbation:
            waveforms = [perturbation(id, waveform) for id, waveform in zip(ids, waveforms, strict=True)]
        pieces = [replace(row, id=id, text=None, audio=x) for id, x in zip(ids, waveforms, strict=True)]
        batch = model.prepare([model.sample(piece) for piece in pieces])
        start = time.perf_counter()
        found = model.decode(batch.to(model.device), options.decoding)
        wall += time.perf_counter() - start
        results.extend(found)
        return [model.alternatives(result) for result in found]

    (transcript,) = transcripts([row.audio], decode, batch_size=options.eval_bsz, max_seconds=max_audio_s)
    if isinstance(transcript, AudioError):
        raise transcript
    scored = sum(result.n_scored for result in results)
    record = model.task(row.mission).record(
        row,
        transcript.text,
        heard=heard,
        seconds=transcript.seconds,
        score=sum(result.score for result in results) / scored if scored else None,
        loop=any(result.loop for result in results),
        wall_seconds=wall,
    )
    return replace(record, details=record.details | {"pieces": len(results), "empty_pieces": transcript.empty})


def open_eval_run(folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Begins an evaluation in a folder, or goes on with the one that is there.

    Only records written since it began count from here on, so that no sample is scored with what another model or an
    earlier evaluation made of it.

    Raises:
        UserError: `resume`, but what is there comes from other settings, or can't be read.
    """
    path = folder / LEDGER
    if resume and path.exists():
        before = _read_ledger(folder)["settings"]
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            differs = ", ".join(f"{name} was {before.get(name)}, is {settings[name]}" for name in changed)
            raise UserError(f"--resume, but the evaluation in {folder} is another one: {differs}; leave --resume out")
        return
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    write_json(path, {"settings": settings, "finished": []})


def check_ids(rows: Iterable[Row]) -> None:
    """Raises a UserError where two rows have one id: records would be taken for each other."""
    first: dict[str, Row] = {}
    for row in rows:
        if (before := first.setdefault(row.id, row)) is not row:
            both = f"{before.place} and {row.place}"
            raise UserError(f"utterance id {row.id!r} occurs twice in a split, of {both}; ids must be unique")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes under a temporary name and renames."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _read_ledger(folder: Path) -> dict[str, Any]:
    path = folder / LEDGER
    try:
        ledger = json.loads(path.read_text())
        return {"settings": dict(ledger["settings"]), "finished": list(ledger["finished"])}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged; leave --resume out, or remove {folder}") from error


def _earlier(folder: Path, name: str, heard: Mapping[str, str]) -> dict[str, EvalRecord]:
    """What has been written since the evaluation began of samples that are still as they were."""
    finished = [folder / f"{name}.jsonl"] if name in _read_ledger(folder)["finished"] else []
    return _records([*finished, *(folder / UNFINISHED / name).glob("*.jsonl")], heard)


def _records(paths: Iterable[Path], heard: Mapping[str, str]) -> dict[str, EvalRecord]:
    """By id, those of samples that are as `heard` has them."""
    records = (record for path in sorted(paths) for record in read_records(path))
    return {record.id: record for record in records if record.heard == heard.get(record.id, "")}


def _note_finished(folder: Path, name: str) -> None:
    ledger = _read_ledger(folder)
    write_json(folder / LEDGER, ledger | {"finished": sorted({*ledger["finished"], name})})


def _score(mission: Mission, records: Sequence[EvalRecord]) -> str:
    """The leading score of the records so far."""
    leading = mission.score(records).leading
    return f"{leading.kind.label} {leading.kind.text(leading.value, 1)}" if records else ""
