"""A conversation: one recurrent state, of the same size and cost however long the talk.

    chat = model.conversation()
    for piece in chat.reply(waveform_16k):
        print(piece, end="")
    chat.save("talk.safetensors")
    chat = model.conversation("talk.safetensors")

What the state has read is, token by token, what a sample of as many rounds is rendered to (`data.rendering`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rwkv_speech.data.sample import Audio, Message, Sample
from rwkv_speech.decoding import generate
from rwkv_speech.errors import UserError, reason
from rwkv_speech.files import write_whole
from rwkv_speech.lm.state import State
from rwkv_speech.lm.tokenizer import END_OF_TEXT, StreamDecoder
from rwkv_speech.options import DecodingOptions
from rwkv_speech.speech.audio import SAMPLE_RATE, Longest, check_waveform
from rwkv_speech.speech.identity import hash_sampled
from rwkv_speech.speech.recording import Recording

if TYPE_CHECKING:
    from rwkv_speech.model import SpeechRWKV

Said = str | Path | Tensor | np.ndarray | Sequence[float]  # typed text, an audio file, or a waveform at 16 kHz


@dataclass(frozen=True)
class _Turn:
    """Where a conversation stands.

    state: of a batch of 1.
    rounds: that are over.
    begun: something was listened to since the last answer, whose end of text the state has therefore read.
    samples: at 16 kHz, of what was listened to in this round.
    """

    state: State
    rounds: int = 0
    begun: bool = False
    samples: int = 0


class Conversation:
    """See the module's text; `SpeechRWKV.conversation` begins one.

    rounds: that are over.
    """

    def __init__(self, model: "SpeechRWKV", *, mission: str | None = None, max_audio_s: float | None = None) -> None:
        self.model, self.task = model, model.task(mission)
        if self.task.mission.chooses:
            raise UserError(f"the mission {self.task.name} chooses among labels, which is no conversation")
        self._longest = Longest(model.longest_piece(max_audio_s, self.task.name), "are answered in one go")
        place = torch.tensor([[*model.tasks].index(self.task.name)], device=model.device)
        state = model.language_model.initial_state(1, place if len(model.tasks) > 1 else None)
        # The initial state of a batch has no dimension for it, where there is one for all.
        self._now = _Turn(state.map(lambda x: x.detach().reshape(1, *x.shape[-3:]).clone() if x.dim() > 2 else x))
        self._before: _Turn | None = None  # where the last round began

    @property
    def rounds(self) -> int:
        return self._now.rounds

    @property
    def max_audio_s(self) -> float:
        """The longest recording, in seconds."""
        return self._longest.seconds

    def listen(self, *said: Said) -> None:
        """Takes in what is said, without an answer to it; the round goes on with what is said next.

        Raises:
            UserError: audio that can't be used.
        """
        _, turn = self._read(said, asked=False)
        self._keep(turn)

    def reply(self, *said: Said, **search: Any) -> Iterator[str]:
        """The answer to what is said, and to what was listened to before in this round, piece by piece.

        A piece is characters that are certain to stand: of a beam search, what all hypotheses agree on. All pieces
        joined are the answer, without white space around it. A conversation whose answer isn't taken to its end is as
        if nothing had been asked.

        Args:
            said: typed texts, paths of audio files, or waveforms at 16 kHz, in the order in which they are read.
            search: fields of `rwkv_speech.options.DecodingOptions`: `temperature=0.7`, `max_new_tokens=100`, ...

        Raises:
            UserError: audio that can't be used, or nothing said in this round.
        """
        options = DecodingOptions(**search)
        hidden, turn = self._read(said, asked=True)
        return self._answer(self._now, hidden, turn, options)

    @property
    def can_undo(self) -> bool:
        """Whether there is a round to take back."""
        return self._before is not None

    def undo(self) -> None:
        """Takes back the last round, or what was listened to since the last answer; once, not again.

        Raises:
            UserError: there is nothing to take back.
        """
        if self._before is None:
            raise UserError("there is no round to take back: that is the last one, once, if it began since loading")
        self._now, self._before = self._before, None

    @torch.inference_mode()
    def ready(self) -> State:
        """The state that reads what is said next: after an answer, its end of text has been read."""
        if not self._answered:
            return self._now.state
        return self.model.language_model(self._end_of_text(), self._now.state)[1]

    def fork(self) -> "Conversation":
        """Another conversation that goes on from here, independently."""
        return copy(self)  # states are never changed in place

    def save(self, path: str | Path) -> None:
        """Writes where the conversation stands to a file, `.safetensors`: of one size however long the talk was.

        Raises:
            UserError: another kind of name, or no room on the disk.
        """
        write_whole(_named(path), save(self._tensors(), {"conversation": json.dumps(self._made_by())}))

    def load(self, path: str | Path) -> "Conversation":
        """The conversation that `save` wrote to a file, with this one's model; this one stays as it is.

        Raises:
            UserError: the file can't be read, or is of another model.
        """
        path = _named(path)
        try:
            with safe_open(path, framework="pt") as file:
                made_by = dict(json.loads(file.metadata()["conversation"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except OSError as error:
            what = "is a folder" if path.is_dir() else error.strerror or "does not exist"
            raise UserError(f"{path}: {what}; expected a saved conversation") from None
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is damaged, or no saved conversation ({reason(error)})") from None
        loaded = Conversation(self.model, mission=made_by.get("mission"), max_audio_s=self.max_audio_s)
        for what, here in loaded._made_by().items():
            if made_by.get(what) != here:
                raise UserError(
                    f"{path}: of another model: {what} was {made_by.get(what)}, is {here}; load it with its own"
                )
        if _kinds(tensors) != _kinds(loaded._tensors()):
            raise UserError(f"{path}: is damaged: not the tensors of a conversation")
        rounds, begun, samples = tensors.pop("counts").tolist()
        loaded._now = _Turn(State.from_state_dict(tensors).to(self.model.device), rounds, bool(begun), samples)
        return loaded

    @torch.inference_mode()
    def _read(self, said: Sequence[Said], *, asked: bool) -> tuple[Tensor, _Turn]:
        """Reads what is said, and "#" where an answer is asked for: the last hidden vector (1, C), and the new turn."""
        model, now = self.model, self._now
        if asked and not said and not now.begun:
            raise UserError("nothing was said: an answer needs a recording or a text")
        parts = tuple(self._part(part, f"audio {i}") for i, part in enumerate(said))
        batch = model.prepare([Sample("", (Message("user", parts),), self.task.name)]).to(model.device)
        x = model.embed(batch, model.embed_audio(batch)[0])  # (1, T, C), with "#" at its end
        if not asked:
            x = x[:, :-1]
        if self._answered:
            x = torch.cat([model.language_model.embed(self._end_of_text()).to(x.dtype), x], dim=1)
        if not x.shape[1]:
            return x, now
        hidden, state = model.language_model(x, now.state)
        return hidden[:, -1], _Turn(state, now.rounds, begun=True, samples=now.samples + sum(batch.samples))

    @property
    def _answered(self) -> bool:
        """An answer came last, whose end of text has not been read."""
        return self._now.rounds > 0 and not self._now.begun

    def _end_of_text(self) -> Tensor:
        return torch.tensor([[END_OF_TEXT]], device=self.model.device)

    def _part(self, part: Said, name: str) -> Audio | str:
        if isinstance(part, Path):
            return Recording(part).waveform(self._longest)
        return part if isinstance(part, str) else check_waveform(part, name, self._longest)

    def _answer(self, begun: _Turn, hidden: Tensor, turn: _Turn, options: DecodingOptions) -> Iterator[str]:
        limit = options.max_new_tokens or self.task.mission.max_new_tokens(turn.samples / SAMPLE_RATE)
        steps = generate(
            *(self.model.language_model, hidden, turn.state),
            max_new_tokens=[limit],
            options=options,
            names=[str(turn.rounds)],
        )
        text = StrippedStream(self.model.tokenizer.stream())
        while True:
            try:
                tokens = next(steps)
            except StopIteration as done:
                (result,) = done.value
                break
            for _, token in tokens:
                if piece := text.feed(token):
                    yield piece
        if piece := text.flush():
            yield piece
        if self._now is not begun:
            raise RuntimeError("the conversation went on elsewhere while this answer was read")
        self._keep(_Turn(result.state, turn.rounds + 1))

    def _keep(self, turn: _Turn) -> None:
        """Goes on to a turn; a round that begins with it can be taken back."""
        if not self._now.begun:
            self._before = self._now
        self._now = turn

    def _tensors(self) -> dict[str, Tensor]:
        """What a file holds."""
        now = self._now
        counts = torch.tensor([now.rounds, now.begun, now.samples])
        copies = now.state.map(lambda x: x.to("cpu", copy=True).contiguous())  # safetensors takes no shared memory
        return copies.state_dict() | {"counts": counts}

    def _made_by(self) -> dict[str, Any]:
        """The model that a state is of; another can't read it."""
        model = self.model
        info = model.describe(self.task.name)
        sizes = "RWKV-{generation}, {n_layer} x {n_embd}, heads of {head_size}, vocabulary of {vocab_size}"
        frozen = {name: x for name, x in model.language_model.state_dict().items() if "time_state" not in name}
        return {
            "mission": self.task.name,
            "language model": sizes.format(**info),
            "precision": str(model.language_model.dtype).removeprefix("torch."),
            "language model's weights": hash_sampled(frozen),
            "encoder": info.get("encoder_digest", info["encoder"]),
            "mission file": hash_sampled(model.trainable_state_dict(self.task.name)),
        }


class StrippedStream:
    """Text of tokens that come one at a time, whole characters only, without white space around all of it."""

    def __init__(self, decoder: StreamDecoder) -> None:
        self._decoder, self._begun, self._held = decoder, False, ""

    def feed(self, token: int) -> str:
        """What is certain after one more token."""
        return self._certain(self._decoder.feed(token))

    def flush(self) -> str:
        """What is left at the end."""
        return self._certain(self._decoder.flush())

    def _certain(self, text: str) -> str:
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
        certain = text.rstrip()
        self._begun, self._held = self._begun or bool(certain), text[len(certain) :]
        return certain


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (x.shape, x.dtype) for name, x in tensors.items()}


def _named(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a name that ends in .safetensors")
    return path
