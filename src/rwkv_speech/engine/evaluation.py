"""Transcribing a split and keeping the record of it, in one process or several, in one go or several."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import SpeechDataset, loader
from rwkv_speech.data.row import Utterance
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_whole
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import Options
from rwkv_speech.scoring import Edits, EvalRecord, RecordWriter, align, read_records
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.augmentation import Perturbation

UNFINISHED = "unfinished"  # folder of what each process has written of the split at hand
LEDGER = "evaluation.json"  # the settings, and the splits that are finished under them


def evaluate(
    model: SpeechRWKV,
    utterances: Sequence[Utterance],
    *,
    name: str,
    change: Perturbation | None,
    options: Options,
    fabric: Fabric,
    bad_audio: BadSamples,
) -> list[EvalRecord]:
    """Transcribes utterances, each exactly once over all processes.

    Every process writes its records as it goes; the first one then joins them to `eval/<name>.jsonl` in the project.
    What stands there of the evaluation that `claim` goes on with is not decoded again.

    Returns:
        All records, in the order of the utterances, in the first process; an empty list in the others.
    """
    folder = options.project / "eval"
    parts = folder / UNFINISHED / name
    # All wait here for the first, so that none writes before it has read.
    done = fabric.broadcast(_earlier(folder, name, utterances) if fabric.is_global_zero else {})
    left = [utterance for utterance in utterances if utterance.id not in done]
    batches = loader(
        SpeechDataset(left, change=change),
        batch_size=options.eval_bsz,
        shuffle=False,
        num_workers=options.num_workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    edits = sum((a.edits for a in align(list(done.values()))), Edits())
    with (
        RecordWriter(parts / f"{fabric.global_rank}.jsonl") as writer,
        _progress(fabric.is_global_zero) as progress,
    ):
        task = progress.add_task(name, total=len(utterances), completed=len(done), wer="")
        for batch in batches:
            bad_audio.add(batch.bad)
            start = time.perf_counter()
            decoded = model.decode_waveforms(
                batch.waveforms,
                beam=options.beam,
                max_new_tokens=options.max_new_tokens,
                loop_guard=options.loop_guard,
            ) if len(batch) else []  # fmt: skip
            wall = (time.perf_counter() - start) / max(1, len(batch))
            for index, waveform, result in zip(batch.indices, batch.waveforms, decoded, strict=True):
                record = EvalRecord(
                    id=left[index].id,
                    reference=left[index].text,
                    hypothesis=model.tokenizer.decode(result.tokens).strip(),
                    seconds=len(waveform) / SAMPLE_RATE,
                    speaker=left[index].speaker,
                    score=result.average_log_prob,
                    loop=result.loop,
                    wall_seconds=wall,
                )
                writer.write(record)
                edits += align([record])[0].edits
            progress.update(
                task, advance=(len(batch) + len(batch.bad)) * fabric.world_size, wer=f"WER {edits.rate:.1%}"
            )
    fabric.barrier()
    if not fabric.is_global_zero:
        return []
    found = done | _by_id(parts.iterdir())
    records = [found[utterance.id] for utterance in utterances if utterance.id in found]
    write_whole(folder / f"{name}.jsonl", b"".join(record.line() for record in records))
    _note_finished(folder, name)
    shutil.rmtree(parts)
    if not any(parts.parent.iterdir()):
        parts.parent.rmdir()
    return records


def claim(folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Begins an evaluation in a folder, or goes on with the one that is there.

    Only records written under this very claim count from here on, so that no utterance is scored with what another
    model or an earlier evaluation made of it.

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


def check_ids(utterances: Iterable[Utterance]) -> None:
    """Raises a UserError where two utterances have one id: records would be taken for each other."""
    counts = Counter(utterance.id for utterance in utterances)
    id, times = counts.most_common(1)[0]
    if times > 1:
        raise UserError(f"utterance id {id!r} occurs {times} times in a split; ids must be unique")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes under a temporary name and renames."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _earlier(folder: Path, name: str, utterances: Sequence[Utterance]) -> dict[str, EvalRecord]:
    """What has been written of these utterances since the evaluation began."""
    finished = name in json.loads((folder / LEDGER).read_text())["finished"]
    found = _by_id([folder / f"{name}.jsonl"] if finished else (folder / UNFINISHED / name).glob("*.jsonl"))
    texts = {utterance.id: utterance.text for utterance in utterances}
    return {id: record for id, record in found.items() if texts.get(id) == record.reference}


def _by_id(paths: Iterable[Path]) -> dict[str, EvalRecord]:
    return {record.id: record for path in sorted(paths) for record in read_records(path)}


def _note_finished(folder: Path, name: str) -> None:
    ledger = json.loads((folder / LEDGER).read_text())
    write_json(folder / LEDGER, ledger | {"finished": sorted({*ledger["finished"], name})})


def _progress(visible: bool) -> Progress:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[wer]}")
    text = [TextColumn(column) if isinstance(column, str) else column for column in columns]
    return Progress(*text, console=Console(stderr=True), disable=not visible)
