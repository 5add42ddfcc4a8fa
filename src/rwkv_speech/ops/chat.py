"""A conversation in the terminal, or over a pipe: typed lines, audio files and the microphone to answers."""

import logging
import sys
from pathlib import Path

from rwkv_speech.engine.machine import fit_to_machine
from rwkv_speech.errors import UserError
from rwkv_speech.files import printable
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops.common import check_model_file, load_model, longest_pieces, only_mission_file
from rwkv_speech.options import DecodingOptions, Options
from rwkv_speech.scoring.formats import counted
from rwkv_speech.session import Said
from rwkv_speech.speech.microphone import has_microphone, record
from rwkv_speech.terminal import say

log = logging.getLogger("rwkv_speech")

COMMANDS = {
    "/audio FILE": "says what is in an audio file",
    "/listen FILE": "lets it be heard without an answer: the next line asks about it",
    "/undo": "takes back the last round",
    "/new": "begins anew",
    "/save FILE": "writes where the conversation stands, as .safetensors",
    "/load FILE": "goes on from there",
    "/help": "says all this",
    "/quit": "ends, as Ctrl-D does",
}
MICROPHONE = {"/mic": "says what the microphone hears, until Enter"}


def chat(options: Options) -> int:
    """Answers line by line: to standard output, and nothing else there but the prompt of a terminal.

    What can't be done is named in the log, and the conversation goes on; over a pipe the exit status is then 1.
    """
    if sys.stdin is None:
        raise UserError("standard input is closed; --op chat reads from it what is said")
    check_model_file(options.model)
    machine = fit_to_machine(options.machine)
    model = load_model(options.model, only_mission_file(options), machine.first_device, machine)
    sys.stdin.reconfigure(errors="replace")
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    talk = _Chat(model, options.decoding, longest_pieces(model, options)[model.task().name], in_terminal)
    log.info("type what you say, or %s", ", ".join(talk.commands))
    failed = False
    while (line := _next_line(in_terminal)) is not None:
        try:
            if not talk.do(line.strip()):
                break
        except (UserError, OSError) as error:  # such as a place that can't be written to
            log.error("%s", error)
            failed = True
        except KeyboardInterrupt:
            if not in_terminal:
                raise
            say("\n")
            log.info("stopped: the question and its answer are forgotten")
    return int(failed and not in_terminal)


def _next_line(in_terminal: bool) -> str | None:
    try:
        return input("> ") if in_terminal else sys.stdin.readline() or None
    except EOFError:
        return None


class _Chat:
    """What each line does to a conversation.

    commands: those that there are here, and what they do.
    """

    def __init__(self, model: SpeechRWKV, search: DecodingOptions, max_audio_s: float, in_terminal: bool) -> None:
        self.model, self.search, self.max_audio_s, self.in_terminal = model, search, max_audio_s, in_terminal
        self.commands = COMMANDS | (MICROPHONE if has_microphone() else {})
        self._begin()

    def do(self, line: str) -> bool:
        """Does what a line says; False: it says to end.

        Raises:
            UserError: it can't be done; the conversation is as before.
        """
        if not line.startswith("/"):
            if line:
                self._answer(line)
            return True
        name, _, argument = line.partition(" ")
        form = next((form for form in self.commands if form.split()[0] == name), None)
        if form is None or bool(argument) != (form != name):
            raise UserError(f"{line!r} is none of the commands {', '.join(self.commands)}")
        path = Path(argument.strip()).expanduser()
        match name:
            case "/audio":
                self._answer(path)
            case "/listen":
                self.talk.listen(path)
            case "/mic":
                log.info("recording: Enter ends it")
                self._answer(record(sys.stdin.readline))
            case "/undo":
                self.talk.undo()
            case "/new":
                self._begin()
            case "/save":
                self.talk.save(path)
            case "/load":
                self.talk = self.talk.load(path)
            case "/help":
                for form, what in self.commands.items():
                    log.info("%s %s", form, what)
        if name in ("/undo", "/new", "/load"):
            log.info("%s so far", counted(self.talk.rounds, "round"))
        return name != "/quit"

    def _begin(self) -> None:
        self.talk = self.model.conversation(max_audio_s=self.max_audio_s)

    def _answer(self, said: Said) -> None:
        """Prints the answer as it comes; over a pipe in one line."""
        for piece in self.talk.reply(said, **vars(self.search)):
            lines = map(printable, piece.split("\n"))
            say(("\n" if self.in_terminal else " ").join(lines))
        say("\n")
