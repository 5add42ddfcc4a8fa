"""Live: audio in pieces of any size -> text that grows while somebody speaks, and stays once they have paused.

    live = model.live()
    for piece in microphone:
        for event in live.feed(piece):
            print(event)
    live.finish()

- Segments of speech end in pauses (`speech.endpoint`). The `Final` of one is what prediction makes of it as a whole.
- Until then there are `Partial`s. Encoders look both ways, so each frame is encoded once, in a window of what was heard
  before (`left`), some positions that are new (`step`) and what comes after these (`right`). New positions go into the
  recurrent state once and for all; the text is decoded from there each time, after the words that are `stable` already.
- Words are stable once two texts in a row have them (Liu et al. 2020, "local agreement"). Holding back just the last
  word was 0.1 s faster, but finals changed twice as many of those words.
- What is in memory is one segment and one state. What torch keeps for lengths of audio that it has met on a CPU is
  bounded, too (`rwkv_speech/__init__.py`).

Models of the size that answers within a step on a CPU are fastest with one thread: `torch.set_num_threads(1)`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.data.rendering import SEPARATOR_ID
from rwkv_speech.data.sample import Row
from rwkv_speech.decoding import complete
from rwkv_speech.errors import UserError
from rwkv_speech.lm.state import State
from rwkv_speech.missions.mission import TOKENS_PER_SECOND
from rwkv_speech.options import DecodingOptions
from rwkv_speech.scoring.languages import units
from rwkv_speech.speech.audio import SAMPLE_RATE, check_waveform
from rwkv_speech.speech.encoder import shortest_input
from rwkv_speech.speech.endpoint import Endpointer, OpenSegment
from rwkv_speech.speech.segments import AudioSegment

if TYPE_CHECKING:
    from rwkv_speech.model import SpeechRWKV
    from rwkv_speech.session import Conversation

LEFT = 1.0  # s; more brings nothing (bench/live.py)
LEFT_IN_WINDOW = 3.0  # s, of encoders with a window of one length


class Partial(NamedTuple):
    """What a segment of speech may come to."""

    text: str
    stable: str
    """The beginning of `text` that all later partials of the segment have, too."""
    audio_ms: int
    """How far the audio is read, in milliseconds from the beginning of the session."""


class Final(NamedTuple):
    """What a segment of speech has come to; it never changes."""

    text: str
    start: float
    """Seconds from the beginning of the session, to the millisecond."""
    end: float


@dataclass
class _Heard:
    """The segment that is being spoken, as far as the model has read it.

    start: seconds.
    positions: that the state has read.
    tokens: of the last partial.
    stable: how many of them are.
    shown: the texts of the last partial.
    """

    start: float
    state: State
    positions: int = 0
    tokens: list[int] = field(default_factory=list)
    stable: int = 0
    shown: tuple[str, str] = ("", "")


class Live:
    """See the module's text; `SpeechRWKV.live` makes one."""

    def __init__(
        self,
        model: "SpeechRWKV",
        *,
        step: float = 0.32,
        right: float = 0.32,
        left: float | None = None,
        pause: float = 0.5,
        max_audio_s: float | None = None,
        mission: str | None = None,
        conversation: "Conversation | None" = None,
        **search: Any,
    ) -> None:
        self.model, self.task = model, conversation.task if conversation else model.task(mission)
        if self.task.mission.chooses:
            raise UserError(
                f"the mission {self.task.name} chooses among labels, once it has heard all: it can't be live"
            )
        if left is None:
            left = LEFT_IN_WINDOW if model.speech_encoder.window else LEFT
        for name, value, least in (("step", step, 0.02), ("right", right, 0), ("left", left, 0), ("pause", pause, 0.1)):
            if not least <= value < math.inf:
                raise UserError(f"live: {name} is {value:g} s; expected at least {least:g}")
        if self.task.mission.rounds and conversation is None:
            conversation = model.conversation(mission=self.task.name, max_audio_s=max_audio_s)
        self.conversation = conversation
        if max_audio_s is not None and not 1 <= max_audio_s < math.inf:
            raise UserError(f"live: max_audio_s is {max_audio_s:g} s; expected at least 1")
        self._search, self._options = search, DecodingOptions(**search)
        longest = model.longest_piece(max_audio_s, self.task.name)
        self._max_audio_s = min(longest, conversation.max_audio_s) if conversation else longest
        self._pause = pause

        hop = math.prod(stride for _, stride in model.speech_encoder.convolutions)
        self._hop = hop * model.adapter.downsample_k  # samples from one position to the next
        self._step = max(1, round(step * SAMPLE_RATE / self._hop))  # positions
        self._right = round(right * SAMPLE_RATE)
        self._left = round(left * SAMPLE_RATE / self._hop)  # positions
        if window := model.speech_encoder.window:
            room = (window - self._end(self._step)) // self._hop
            if room < 0:
                raise UserError(
                    f"live: step and right, {step:g} + {right:g} s, are more than the {window / SAMPLE_RATE:g} s that "
                    "the speech encoder hears at once"
                )
            self._left = min(self._left, room)

        self._began = 0.0  # s, of what the endpointer hears
        self._samples = 0  # that it has heard
        self._restart()

    def feed(self, samples: Tensor | np.ndarray | Sequence[float]) -> list[Partial | Final]:
        """Takes in the next samples (samples,), floats or 16-bit integers at 16 kHz: what is new by them.

        Finals don't depend on how the audio is cut into pieces. Partials come at most once a call: for a piece that is
        longer than a step only the last one, so that whoever is late catches up.

        Raises:
            AudioError: samples that can't be used.
        """
        return [x if isinstance(x, Partial) else self._final(x) for x in self.hear(samples)]

    def finish(self) -> list[Partial | Final]:
        """The end of the audio: what is left becomes final. What is fed then begins anew, as time goes on."""
        return [self._final(segment) for segment in self.hear_rest()]

    def hear(self, samples: Tensor | np.ndarray | Sequence[float]) -> Iterator[AudioSegment | Partial]:
        """As `feed`, with the audio of finals in the place of their texts, for whoever decodes it elsewhere."""
        waveform = _waveform(samples)
        if not len(waveform):
            return
        self._samples += len(waveform)
        yield from map(self._in_session, self._endpointer.feed(waveform))
        if partial := self._partial():
            yield partial

    def hear_rest(self) -> Iterator[AudioSegment]:
        """As `finish`, with audio as of `hear`."""
        yield from map(self._in_session, self._endpointer.finish())
        self._began += self._samples / SAMPLE_RATE
        self._restart()

    def cancel(self) -> None:
        """Forgets the segment that is being spoken."""
        self._endpointer.drop()
        self._heard = None

    def _restart(self) -> None:
        self._endpointer = Endpointer(pause=self._pause, longest=self._max_audio_s)
        self._samples = 0
        self._heard: _Heard | None = None

    def _in_session(self, segment: AudioSegment) -> AudioSegment:
        return replace(segment, start=self._began + segment.start)

    def _final(self, segment: AudioSegment) -> Final:
        if self.conversation:
            text = "".join(self.conversation.reply(segment.waveform, **self._search))
        else:
            how = {"max_audio_s": self._max_audio_s, "mission": self.task.name}
            (text,) = self.model.transcribe([segment.waveform], **how, **self._search)
        return final(segment, text)

    @torch.inference_mode()
    def _partial(self) -> Partial | None:
        """What is new of the segment that is being spoken."""
        spoken = self._endpointer.open
        if not spoken:
            self._heard = None
            return None
        if not self._heard or self._heard.start != spoken.start:
            self._heard = _Heard(spoken.start, self._initial_state())
        heard, read = self._heard, self._heard.positions
        while read_on := self._next(heard.positions, spoken):
            self._read(heard, spoken.waveform, *read_on)
        if heard.positions == read:
            return None
        before, heard.tokens = heard.tokens, heard.tokens[: heard.stable] + self._continue(heard)
        if self.task.mission.cut:  # of other missions, the first word may depend on the last that is heard
            heard.stable = max(heard.stable, self._agreed(heard.tokens, before))
        seconds = self._began + heard.start + heard.positions * self._hop / SAMPLE_RATE
        shown, heard.shown = heard.shown, (self._text(heard.tokens), self._text(heard.tokens[: heard.stable]))
        return Partial(*heard.shown, round(1000 * seconds)) if heard.shown != shown else None

    def _initial_state(self) -> State:
        return (self.conversation or self.model.conversation(mission=self.task.name)).ready()

    def _next(self, read: int, segment: OpenSegment) -> tuple[int, int] | None:
        """Up to which position of a segment to read next, and up to which sample to listen for that; None: wait.

        In a pause all that was said is read as if the segment ended there, as the final may: what the encoder would
        hear as right context is silence, and silence is read only once somebody speaks again.
        """
        model, end = self.model, read + self._step
        until = self._end(end)
        if segment.spoken < len(segment.waveform):
            end = min(end, model.adapter.group_count(model.speech_encoder.frame_count(segment.spoken)))
            until = min(until, segment.spoken)
        return (end, until) if end > read and until <= len(segment.waveform) else None

    def _end(self, positions: int) -> int:
        """The samples of a segment that there must be for its first positions to be read."""
        frames = positions * self.model.adapter.downsample_k
        return max(positions * self._hop, shortest_input(self.model.speech_encoder.convolutions, frames)) + self._right

    def _read(self, heard: _Heard, waveform: Tensor, end: int, until: int) -> None:
        """Reads a segment on to a position, from a window that ends at a sample."""
        model = self.model
        first = max(0, heard.positions - self._left)
        window = waveform[first * self._hop : until]
        batch = model.prepare([model.sample(Row("", None, window, mission=self.task.name))]).to(model.device)
        positions = model.embed_audio(batch)[0][:, heard.positions - first : end - first]  # (1, step, C)
        _, heard.state = model.language_model(positions, heard.state)
        heard.positions = end

    def _continue(self, heard: _Heard) -> list[int]:
        """The tokens that follow the stable ones, from a copy of the state."""
        model = self.model.language_model
        seconds = heard.positions * self._hop / SAMPLE_RATE
        if self.task.mission.cut:  # no more than can be said by then: on a server, others wait for it
            limit = self._options.max_new_tokens or math.ceil(TOKENS_PER_SECOND * seconds)
        else:
            limit = self._options.max_new_tokens or self.task.mission.max_new_tokens(seconds)
        if heard.stable >= limit:
            return []
        asked = torch.tensor([[SEPARATOR_ID, *heard.tokens[: heard.stable]]], device=self.model.device)
        hidden, state = model(asked, heard.state)
        (result,) = complete(model, hidden[:, -1], state, max_new_tokens=[limit - heard.stable])
        return result.tokens

    def _agreed(self, tokens: list[int], before: list[int]) -> int:
        """How many tokens are of the words that two texts have in common, from the first word on."""
        decode = self.model.tokenizer.decode
        text, end = decode(tokens), 0
        for word, earlier in zip_longest(units(text), units(decode(before))):
            if word is None:
                break
            begin = text.index(word, end)
            if word != earlier:
                end = begin if end else 0  # with the space before it
                break
            end = begin + len(word)
        parts = ((n, decode(tokens[:n])) for n in range(len(tokens), 0, -1))
        # What ends within a character may go on as another one.
        return next((n for n, part in parts if text[:end].startswith(part) and not part.endswith("\ufffd")), 0)

    def _text(self, tokens: list[int]) -> str:
        return self.model.tokenizer.decode(tokens).strip()


def final(segment: AudioSegment, text: str) -> Final:
    """What a segment that `Live.hear` gave has come to."""
    return Final(text, round(segment.start, 3), round(segment.end, 3))


def _waveform(samples: Tensor | np.ndarray | Sequence[float]) -> Tensor:
    """A copy (samples,) on the CPU, so that whoever gave them may use their memory again."""
    found = samples.detach().cpu().clone() if isinstance(samples, Tensor) else torch.from_numpy(np.array(samples))
    if found.dtype == torch.int16:
        found = found / 32768
    return check_waveform(found, "live audio") if found.numel() else found.flatten()
