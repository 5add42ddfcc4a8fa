"""Transcribing a split and keeping the record of it, in one process or several, in one go or several."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rwkv_speech.data.bad_audio import BadAudio
from rwkv_speech.data.batches import Speech, loader
from rwkv_speech.data.utterance import Utterance
from rwkv_speech.errors import UserError
from rwkv_speech.options import Options
from rwkv_speech.scoring import Edits, Hypothesis, RecordWriter, align, read_records
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.perturb import Perturbation
from rwkv_speech.system import SpeechRWKV


def evaluate(
    model: SpeechRWKV,
    utterances: Sequence[Utterance],
    *,
    name: str,
    change: Perturbation | None,
    options: Options,
    fabric: Fabric,
    bad_audio: BadAudio,
) -> list[Hypothesis]:
    """Transcribes utterances, each exactly once over all processes.

    Every process writes its records as it goes; the first one then joins them to `eval/<name>.jsonl` in the project.
    With `options.resume`, what an interrupted evaluation has written is not decoded again.

    Returns:
        All records, in the order of the utterances, in the first process; an empty list in the others.
    """
    folder = options.project / "eval"
    whole = folder / f"{name}.jsonl"
    parts = [folder / f".{name}.part{rank}.jsonl" for rank in range(fabric.world_size)]
    mine = parts[fabric.global_rank]
    earlier = {
        record.id: record for path in (whole, *folder.glob(f".{name}.part*.jsonl")) for record in read_records(path)
    }
    done = earlier if options.resume else {}
    fabric.barrier()  # all have read what was there before any of them writes
    left = [utterance for utterance in utterances if utterance.id not in done]
    batches = loader(
        Speech(left, change=change),
        batch_size=options.eval_bsz,
        shuffle=False,
        num_workers=options.num_workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    edits = sum((a.edits for a in align(list(done.values()))), Edits())
    with RecordWriter(mine, resume=options.resume) as writer, _progress(fabric.is_global_zero) as progress:
        task = progress.add_task(name, total=len(batches.dataset), wer="")
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
                record = Hypothesis(
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
    found = done | {record.id: record for path in parts for record in read_records(path)}
    records = [found[utterance.id] for utterance in utterances if utterance.id in found]
    temporary = folder / f".{name}.whole"
    temporary.unlink(missing_ok=True)
    with RecordWriter(temporary) as writer:
        for record in records:
            writer.write(record)
    os.replace(temporary, whole)
    for path in parts:
        path.unlink(missing_ok=True)
    return records


def claim(folder: Path, identity: dict[str, Any], *, resume: bool) -> None:
    """Writes down what is evaluated, so that an interrupted evaluation is not continued with another model.

    Raises:
        UserError: `resume`, but what is there comes from other settings.
    """
    path = folder / "evaluation.json"
    if resume and path.exists():
        before = json.loads(path.read_text())
        changed = [name for name in identity if before.get(name) != identity[name]]
        if changed:
            differs = ", ".join(f"{name} was {before.get(name)}, is {identity[name]}" for name in changed)
            raise UserError(f"--resume, but the evaluation in {folder} is another one: {differs}; leave --resume out")
    write_json(path, identity)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes under a temporary name and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def _progress(visible: bool) -> Progress:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[wer]}")
    text = [TextColumn(column) if isinstance(column, str) else column for column in columns]
    return Progress(*text, console=Console(stderr=True), disable=not visible)
