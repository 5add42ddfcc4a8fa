"""Live text in a terminal or a pipe: of the microphone, of a file, or of samples that come through standard input."""

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from rich.cells import cell_len
from torch import Tensor

from rwkv_speech.engine.machine import fit_to_machine
from rwkv_speech.errors import UserError
from rwkv_speech.files import printable
from rwkv_speech.live import Final, Partial
from rwkv_speech.ops.common import check_model_file, load_model, longest_pieces, only_mission_file
from rwkv_speech.options import Options
from rwkv_speech.speech.audio import SAMPLE_RATE, audio_blocks
from rwkv_speech.speech.microphone import has_microphone, listen
from rwkv_speech.terminal import say
from rwkv_speech.transcription import json_line

log = logging.getLogger("rwkv_speech")

STANDARD_INPUT = "-"
_PIECE = SAMPLE_RATE // 10  # samples of a file that are fed at once


def live(options: Options) -> int:
    """Text as it is spoken: to standard output, and nothing else there.

    In a terminal, text that may change is faint; elsewhere only what is final gets a line. As JSON, every event does.
    """
    (source,) = options.file_path or [None]
    if source is None and not has_microphone():
        raise UserError(
            "--op live listens to the microphone by the package sounddevice: pip install sounddevice; or give a file, "
            "--file_path FILE, or raw samples on standard input, --file_path -"
        )
    if source == STANDARD_INPUT and sys.stdin is None:
        raise UserError("standard input is closed; --file_path - reads samples from it")
    check_model_file(options.model)
    machine = fit_to_machine(options.machine)
    model = load_model(options.model, only_mission_file(options), machine.first_device, machine)
    torch.set_num_threads(1)  # a step is too short to be shared, and a second thread makes it wait for other programs
    times = {name.removesuffix("_s"): x for name, x in vars(options.live).items() if name.endswith("_s")}
    max_audio_s = longest_pieces(model, options)[model.task().name]
    session = model.live(**times, max_audio_s=max_audio_s, **vars(options.decoding))
    show = _as_json if options.format == "json" else _in_terminal if sys.stdout.isatty() else _finals
    try:
        for piece in _pieces(source, realtime=options.live.realtime):
            _show_all(session.feed(piece), show)
    except KeyboardInterrupt:
        if source not in (None, STANDARD_INPUT):
            raise
    _show_all(session.finish(), show)
    return 0


def _pieces(source: str | None, *, realtime: bool) -> Iterator[Tensor | np.ndarray]:
    """Samples at 16 kHz, as they come."""
    if source is None:
        log.info("listening: Ctrl-C ends it")
        yield from listen()
    elif source == STANDARD_INPUT:
        yield from _samples_of(sys.stdin.buffer.read1)
    else:
        pieces = (piece for block in audio_blocks(source) for piece in block.split(_PIECE))
        yield from _paced(pieces) if realtime else pieces


def _samples_of(read: Callable[[int], bytes]) -> Iterator[np.ndarray]:
    """16-bit samples, the lower byte first, of bytes that come in pieces of any size."""
    rest = b""
    while data := read(65_536):
        data = rest + data
        whole = len(data) // 2 * 2
        rest = data[whole:]
        yield np.frombuffer(data[:whole], "<i2")


def _paced(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each piece not before it would have been spoken; what is due already, together."""
    began, samples = time.monotonic(), 0
    due: list[Tensor] = []
    for piece in pieces:
        samples += len(piece)
        due.append(piece)
        wait = began + samples / SAMPLE_RATE - time.monotonic()
        if wait > 0:
            time.sleep(wait)
            yield torch.cat(due)
            due = []
    if due:
        yield torch.cat(due)


def _show_all(events: Iterable[Partial | Final], show: Callable[[Partial | Final], None]) -> None:
    for event in events:
        show(event)


def _as_json(event: Partial | Final) -> None:
    say(json_line({"type": type(event).__name__.lower(), **event._asdict()}))


def _finals(event: Partial | Final) -> None:
    if isinstance(event, Final) and event.text:
        say(f"{printable(event.text)}\n")


def _in_terminal(event: Partial | Final) -> None:
    """One line that is written again and again, its end if it is longer than the terminal is wide."""
    text = printable(event.text)
    if isinstance(event, Final):
        say(f"\r\x1b[K{text}\n" if text else "\r\x1b[K")
        return
    stable = len(printable(event.stable))
    columns = shutil.get_terminal_size().columns - 1
    hidden = next(n for n in range(len(text) + 1) if cell_len(text[n:]) <= columns)
    sure, rest = text[hidden : max(hidden, stable)], text[max(hidden, stable) :]
    say(f"\r\x1b[K{sure}\x1b[2m{rest}\x1b[0m")
