"""Prediction: recordings of any length -> text, on standard output or into files."""

import glob
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rwkv_speech.data.librispeech import AUDIO_SUFFIXES
from rwkv_speech.engine.machine import fit_to_machine
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_whole
from rwkv_speech.ops.common import check_model_file, chosen_adapter, load_model
from rwkv_speech.options import Options
from rwkv_speech.transcription import FORMATS, output_files

log = logging.getLogger("rwkv_speech")


def predict(options: Options) -> int:
    """Answers to files: to standard output, and nothing else there, or each into a file of its own.

    A file that can't be used is named in the log; the others go on, and the exit status is 1.
    """
    paths = list(_audio_files(options.file_path or []))
    folder = Path(options.output_dir).expanduser() if options.output_dir else None
    places = output_files(paths, folder, options.format) if folder else None
    if not places and len(paths) > 1 and options.format in ("srt", "vtt"):
        raise UserError(f"--format {options.format} of {len(paths)} files needs --output_dir: a folder for them")
    check_model_file(options.model)
    machine = fit_to_machine(options.machine)
    model = load_model(options.model, chosen_adapter(options), machine.first_device, machine)
    if options.prompt and model.mission.name != "answer":
        raise UserError(f"--prompt goes with the mission answer, not {model.mission.name}")
    transcripts = model.transcripts(
        paths,
        batch_size=options.eval_bsz,
        max_audio_s=options.max_audio_s,
        prompt=options.prompt,
        options=replace(options.decoding, n_best=options.decoding.beam if options.format == "json" else 1),
    )
    failed = 0
    for index, transcript in enumerate(transcripts):
        if isinstance(transcript, UserError):
            log.error("%s", transcript)
            failed += 1
        elif places:
            write_whole(places[index], FORMATS[options.format](transcript).encode())
        else:
            print(FORMATS[options.format](transcript), end="", flush=True)
    if failed:
        log.error("%d of %d files could not be transcribed", failed, len(paths))
    return int(failed > 0)


def _audio_files(patterns: list[str]) -> Iterator[str]:
    """Files, the audio files of folders, and what globs find, in the order given."""
    for pattern in patterns:
        if os.path.isdir(pattern):
            found = sorted(str(p) for p in Path(pattern).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
        elif os.path.exists(pattern) or not glob.has_magic(pattern):
            found = [pattern]
        else:
            found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"--file_path {pattern}: no audio files there")
        yield from found
