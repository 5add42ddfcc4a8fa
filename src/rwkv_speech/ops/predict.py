"""Prediction: recordings of any length -> text, on standard output or into files."""

import glob
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rwkv_speech.data.listing import audio_files
from rwkv_speech.engine.machine import fit_to_machine
from rwkv_speech.errors import UserError
from rwkv_speech.files import check_folder, write_whole
from rwkv_speech.ops.common import check_model_file, load_model, longest_pieces, only_mission_file
from rwkv_speech.options import Options
from rwkv_speech.progress import Progress
from rwkv_speech.terminal import ESCAPED, say
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
    if folder:
        check_folder(folder, "output_dir")
    machine = fit_to_machine(options.machine)
    model = load_model(options.model, only_mission_file(options), machine.first_device, machine)
    task = model.task()
    if options.prompt and task.mission.name != "answer":
        raise UserError(f"--prompt goes with the mission answer, not {task.name}")
    transcripts = model.transcripts(
        paths,
        batch_size=options.eval_bsz,
        max_audio_s=longest_pieces(model, options)[task.name],
        prompt=options.prompt,
        options=replace(options.decoding, n_best=options.decoding.beam if options.format == "json" else 1),
    )
    failed = 0
    seen = not places and sys.stdout.isatty()  # then the transcripts themselves show how far it is
    with Progress("prediction", len(paths), "files", log_every=options.log_every, visible=not seen) as progress:
        for index, transcript in enumerate(transcripts):
            progress.advance(1)
            if isinstance(transcript, UserError):
                log.error("%s", transcript)
                failed += 1
                continue
            if not transcript.segments:
                log.info("%s: no speech in it", transcript.name)
            if transcript.empty:
                segments = len(transcript.segments)
                log.warning("%s: %d of %d segments gave no text", transcript.name, transcript.empty, segments)
            if places:
                write_whole(places[index], FORMATS[options.format](transcript).encode(errors=ESCAPED))
            else:
                say(FORMATS[options.format](transcript))
    if failed:
        log.error("%d of %d files could not be transcribed", failed, len(paths))
    return int(failed > 0)


def _audio_files(patterns: list[str]) -> Iterator[str]:
    """Files, the audio files of folders, and what globs find, in the order given."""
    for pattern in patterns:
        is_there = os.path.lexists(pattern) or not glob.has_magic(pattern)
        found = []
        for place in [pattern] if is_there else sorted(glob.glob(pattern, recursive=True)):
            found += map(str, audio_files(Path(place))) if os.path.isdir(place) else [place]
        if not found:
            raise UserError(f"--file_path {pattern}: no audio files there")
        yield from found
