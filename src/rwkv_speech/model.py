"""SpeechRWKV: a frozen speech encoder, a trained adapter, a frozen RWKV and its trained initial state, joined.

    RWKV([initial state], [adapter](encoder(audio)), "#") -> answer, end of text

What stands in brackets is trained. A plain module: usable from a notebook (`transcribe`, `loss`), and by the engine,
which holds it and knows how to train it.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from rwkv_speech import pretrained
from rwkv_speech.answering import answers
from rwkv_speech.data.batches import Batch, Collate, SpeechDataset
from rwkv_speech.data.rendering import Renderer
from rwkv_speech.data.sample import Row, Sample
from rwkv_speech.decoding import DecodingResult
from rwkv_speech.errors import UserError
from rwkv_speech.live import Live
from rwkv_speech.lm import peft
from rwkv_speech.lm.language_model import LanguageModel, last
from rwkv_speech.lm.peft import PeftWeights
from rwkv_speech.lm.state import State
from rwkv_speech.lm.tokenizer import Tokenizer
from rwkv_speech.missions.task import Task
from rwkv_speech.options import DecodingOptions
from rwkv_speech.session import Conversation
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, check_waveform, duration
from rwkv_speech.speech.augmentation import apply_masks
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.frame_cache import AbsentEncoder
from rwkv_speech.speech.hub import encoder_folder
from rwkv_speech.speech.identity import encoder_digest
from rwkv_speech.trained import TrainedTensor, mission_tensors, trained_tensors
from rwkv_speech.transcription import Alternative, Transcript, transcripts

MAX_AUDIO_S = 30.0


class SpeechRWKV(nn.Module):
    """See the module's text. Only adapters, the language model's `time_state`s and what `lm.peft` puts beside its
    matrices take gradients.

    adapters: one for all tasks, or one for each; all of one K.
    tasks: what is asked of the model, by name. Each has an initial state of its own; a row that names no mission is of
        the first.
    renderer: makes sequences of samples.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        speech_encoder: SpeechEncoder | AbsentEncoder,
        *adapters: Adapter,
        tasks: Sequence[Task] = (Task("transcribe"),),
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.speech_encoder = speech_encoder
        self.adapters = nn.ModuleList(adapters)
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) > 1:
            language_model.hold_states(len(self.tasks))
        self.tokenizer = Tokenizer(language_model.sizes.vocab_size)
        self.renderer = Renderer(
            self.tokenizer, frame_count=speech_encoder.frame_count, group_count=self.adapter.group_count
        )
        for tensor in self.trained_tensors().values():
            tensor.parameter.requires_grad_()

    from_pretrained = classmethod(pretrained.load)

    @property
    def device(self) -> torch.device:
        return self.adapter.layers[0].weight.device

    @property
    def adapter(self) -> Adapter:
        """The first one; what all share, as K, is to be had of it."""
        return self.adapters[0]

    def task(self, name: str | None = None) -> Task:
        """The task of this name, or the first.

        Raises:
            UserError: the model has no such task.
        """
        if not name:
            return next(iter(self.tasks.values()))
        if name not in self.tasks:
            raise UserError(f"the model has not learnt the mission {name!r}, but: {', '.join(self.tasks)}")
        return self.tasks[name]

    @property
    def aligned(self) -> set[str]:
        """The tasks whose answers CTC can align with what is said: transcripts, where there are any, else all."""
        transcripts = {name for name, task in self.tasks.items() if task.mission.name == "transcribe"}
        return transcripts or set(self.tasks)

    def sample(self, row: Row) -> Sample:
        """What the model is to make of a row.

        Raises:
            SampleError: the row lacks what its mission needs.
            UserError: the model has not learnt its mission.
        """
        task = self.task(row.mission)
        return replace(task.mission.sample(row), mission=task.name)

    # What is trained

    def trained_tensors(self) -> dict[str, TrainedTensor]:
        """Everything that is trained, by names of its own; see `rwkv_speech.trained`."""
        return trained_tensors(self.language_model, self.adapters)

    def trainable_state_dict(self, task: str | None = None, *, published: bool = False) -> dict[str, Tensor]:
        """What is trained for a task (the first), under the names of a mission file: the parameters themselves; where
        there are several states, views of them.

        published: as a mission file holds it, which is something else where the adapter standardises its frames.
        """
        place = [*self.tasks].index(self.task(task).name)
        states = self.language_model.time_states
        if len(self.tasks) > 1:
            states = [state[place] for state in states]
        return mission_tensors(states, self._adapter_of(place), published=published)

    def peft_weights(self) -> PeftWeights | None:
        """What was put beside the language model's matrices, as the folder beside a mission file holds it; all tasks
        share it."""
        return peft.weights(self.language_model)

    def _adapter_of(self, place: int) -> Adapter:
        """The adapter of the task in this place."""
        return self.adapters[place if len(self.adapters) > 1 else 0]

    def describe(self, name: str | None = None, **more: Any) -> dict[str, Any]:
        """What a reader of the mission file of a task (the first) must know beside its weights, and `more`."""
        sizes, task = self.language_model.sizes, self.task(name)
        adapter = self._adapter_of([*self.tasks].index(task.name))
        folder = encoder_folder(self.speech_encoder.name)
        return {
            "mission": task.name,
            **({"labels": task.labels} if task.labels else {}),
            "encoder": self.speech_encoder.name,
            **({"encoder_digest": encoder_digest(folder)} if folder else {}),
            "encoder_width": self.speech_encoder.width,
            "downsample_k": adapter.downsample_k,
            "adapter_hidden": adapter.layers[0].out_features,
            "generation": sizes.generation,
            "n_layer": sizes.n_layer,
            "n_embd": sizes.n_embd,
            "head_size": sizes.head_size,
            "vocab_size": sizes.vocab_size,
            **({"quant": self.language_model.quant} if self.language_model.quant else {}),
            "versions": {name: _version(name) for name in ("rwkv-speech", "torch", "transformers")},
        } | more

    @torch.no_grad()
    def load_trained(self, tensors: Mapping[str, Tensor], task: str | None = None) -> None:
        """Takes over tensors, of shapes that fit, under their names in a mission file of a task (the first)."""
        parameters = self.trainable_state_dict(task)
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)

    # From samples to hidden vectors

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples, as a loader's workers would make it.

        Raises:
            AudioError: audio that can't be used.
        """
        dataset = SpeechDataset((), sample_of=self.sample, renderer=self.renderer, extract=self.speech_encoder.extract)
        items = [dataset.read(sample, i) for i, sample in enumerate(samples)]
        return Collate(self.adapter.group_count, is_frames=False)(items)

    def encode(self, batch: Batch) -> Tensor:
        """The encoder's frames of all recordings of a batch, (A, F, width), in the language model's type."""
        audio = batch.audio.to(self.device, non_blocking=True).split(batch.audio_sizes)
        if not audio:
            frames = torch.zeros(0, 1, self.speech_encoder.width, device=self.device)
        elif batch.is_frames:
            frames = pad_sequence(audio, batch_first=True)
        else:
            frames = self.speech_encoder.encode(audio, batch.samples)
        frames = frames.to(self.language_model.dtype)
        return frames if batch.masks is None else apply_masks(frames, batch.frame_lengths, batch.masks)

    def embed_audio(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch on the model's device -> what the adapter makes of its recordings: embeddings (A, G, n_embd), and
        the valid positions (A,) of each."""
        frames = self.encode(batch)
        if len(self.adapters) == 1:
            return self.adapter(frames, batch.frame_lengths)
        places = self._places(batch)
        parts, order = [], []
        # All of them, also on no recording: processes must come by their gradients in one order, or ZeRO adds up
        # those of different adapters.
        for place, adapter in enumerate(self.adapters):
            own = [recording for recording, owner in enumerate(batch.owners) if places[owner] == place]
            rows = self._on_device(own)
            parts.append(adapter(frames[rows], batch.frame_lengths[rows]))
            order += own
        back = self._on_device(sorted(range(len(order)), key=order.__getitem__))
        embeds, valid = (torch.cat(part)[back] for part in zip(*parts, strict=True))
        return embeds, valid

    def embed(self, batch: Batch, audio_embeds: Tensor) -> Tensor:
        """The sequences of a batch as embeddings (B, T, n_embd): those of its tokens, and of audio in its slots."""
        x = self.language_model.embed(batch.ids)
        valid = audio_embeds.flatten(0, 1).index_select(0, batch.audio_groups)
        return x.flatten(0, 1).index_copy_(0, batch.audio_slots, valid.to(x.dtype)).view_as(x)

    def which(self, batch: Batch) -> Tensor | None:
        """Which initial state each sample of a batch starts from, where there are several."""
        if len(self.tasks) == 1:
            return None
        return self._on_device(self._places(batch))

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        # Not torch.tensor(..., device=...), which waits for all that a GPU has to do.
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)

    def _places(self, batch: Batch) -> list[int]:
        """The place of each sample's task."""
        places = {name: place for place, name in enumerate(self.tasks)}
        return [places[self.task(name).name] for name in batch.missions]

    # What is made of them

    def loss_sum(self, batch: Batch, audio_embeds: Tensor | None = None, *, longest: int | None = None) -> Tensor:
        """The cross-entropy summed over all labels of a batch, of which it has `batch.tokens`; fp32 scalar.

        batch: on the model's device.
        audio_embeds: where they are there already.
        longest: positions that the language model reads in one go. Longer sequences are read piece by piece with the
            state carried on, and again in the backward pass: the gradient is that of one pass, the memory that of a
            piece.
        """
        audio_embeds = self.embed_audio(batch)[0] if audio_embeds is None else audio_embeds
        x, T = self.embed(batch, audio_embeds), batch.ids.shape[1]
        state = self.language_model.initial_state(len(batch), self.which(batch))
        if longest is None or longest >= T:
            return self._read(x, state, batch.label_slots, batch.labels)[0]
        rows, positions = batch.label_slots // T, batch.label_slots % T
        total = torch.zeros((), device=self.device)
        for start, piece in zip(range(0, T, longest), x.split(longest, dim=1), strict=True):
            inside = (positions >= start) & (positions < start + longest)
            slots = rows[inside] * piece.shape[1] + positions[inside] - start
            loss, state = checkpoint(self._read, piece, state, slots, batch.labels[inside], use_reentrant=False)
            total = total + loss
        return total

    def _read(self, x: Tensor, state: State, label_slots: Tensor, labels: Tensor) -> tuple[Tensor, State]:
        """The summed cross-entropy of sequences x (B, T, C) that go on from a state, and the state after them."""
        hidden, state = self.language_model(x, state)
        # Logits only where something is asked.
        logits = self.language_model.logits(hidden.flatten(0, 1).index_select(0, label_slots)).float()
        return F.cross_entropy(logits, labels, reduction="sum"), state

    def no_loss(self, batch: Batch) -> Tensor:
        """Zero, from the same path as `loss_sum` of a batch that has samples: for one that has none, on the device.

        Without it, processes would come by their gradients in different orders, and ZeRO would add up those of
        different tensors.
        """
        audio_embeds, _ = self.embed_audio(batch)
        one = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        which = None if len(self.tasks) == 1 else one[0]
        hidden, _ = self.language_model(self.language_model.embed(one) + audio_embeds.sum(), which=which)
        return hidden.sum() * 0.0

    def loss(self, waveforms: Sequence[Tensor], texts: Sequence[str], *, mission: str | None = None) -> Tensor:
        """Cross-entropy averaged over answer tokens and ends of text, differentiable in adapter and state.

        Args:
            waveforms: 1-D float arrays at 16 kHz.
            texts: the answers: transcripts, say.
            mission: which of several; None is the first.
        """
        audio = [check_waveform(w, f"waveform {i}") for i, w in enumerate(waveforms)]
        rows = [Row(str(i), text, w, mission=mission) for i, (w, text) in enumerate(zip(audio, texts, strict=True))]
        batch = self.prepare([self.sample(row) for row in rows]).to(self.device)
        return self.loss_sum(batch) / batch.tokens

    @torch.no_grad()
    def decode(
        self,
        batch: Batch,
        options: DecodingOptions = DecodingOptions(),
        audio_embeds: Tensor | None = None,
    ) -> list[DecodingResult]:
        """The answer to each sample of a batch, after its prompt; batch and audio_embeds as for `loss_sum`.

        Where answers are chosen from a set, `options` have no say.

        Raises:
            UserError: the mission chooses among labels, and there are none.
        """
        hidden, state = self.read(batch, audio_embeds)
        return answers(self, batch, range(len(batch)), hidden, state, options)

    @torch.no_grad()
    def read(self, batch: Batch, audio_embeds: Tensor | None = None) -> tuple[Tensor, State]:
        """The hidden vectors (B, C) before the answers to a batch, as for `decode`, and the state there."""
        audio_embeds = self.embed_audio(batch)[0] if audio_embeds is None else audio_embeds
        x = self.embed(batch, audio_embeds)[:, : int(batch.prompt_lengths.max())]
        with torch.inference_mode():
            hidden, state = self.language_model(x, None, batch.prompt_lengths, self.which(batch))
            return last(hidden, batch.prompt_lengths), state

    def text(self, result: DecodingResult) -> str:
        """The text of an answer."""
        return self.tokenizer.decode(result.tokens).strip()

    def conversation(
        self, path: str | Path | None = None, *, mission: str | None = None, max_audio_s: float | None = None
    ) -> Conversation:
        """A conversation from its beginning, or the one in a file that `Conversation.save` wrote.

        Args:
            path: the file; the mission is then its own.
            mission: which of several; None is the first.
            max_audio_s: longer recordings are refused; None: see `longest_piece`.

        Raises:
            UserError: the file can't be read, or is of another model.
        """
        begun = Conversation(self, mission=mission, max_audio_s=max_audio_s)
        return begun if path is None else begun.load(path)

    def live(
        self,
        *,
        step: float = 0.32,
        right: float = 0.32,
        left: float | None = None,
        pause: float = 0.5,
        max_audio_s: float | None = None,
        mission: str | None = None,
        conversation: Conversation | None = None,
        **search: Any,
    ) -> Live:
        """A session that takes audio while it comes in, and gives text: see `rwkv_speech.live`. All times in seconds.

        Args:
            step: audio that is read at a time, in whole positions; there is a partial after each.
            right: audio after a step that the encoder hears with it: what it costs in delay, it gains in words.
            left: audio before a step that the encoder hears with it; None: 1, or 3 where its window has one length.
            pause: silence that ends a segment.
            max_audio_s: the longest segment; None: see `longest_piece`.
            mission: which of several; None is the first.
            conversation: whose next rounds the segments are; of `converse`, None is a new one. Else each segment
                begins with the mission's initial state.
            search: of finals, as for `transcribe`; partials are greedy.

        Raises:
            UserError: times that can't be, or a mission that chooses among labels.
        """
        times = {"step": step, "right": right, "left": left, "pause": pause, "max_audio_s": max_audio_s}
        return Live(self, **times, mission=mission, conversation=conversation, **search)

    def transcribe(
        self,
        audio: Sequence[str | Path | Tensor],
        *,
        batch_size: int = 8,
        max_audio_s: float | None = None,
        prompt: str | None = None,
        mission: str | None = None,
        **search: Any,
    ) -> list[str]:
        """Transcripts of recordings, in their order.

        Args:
            audio: paths, or 1-D float arrays at 16 kHz.
            batch_size: how many are decoded together; recordings of like length share a batch.
            max_audio_s: longer recordings are cut in pauses, as `segments.cut` does, and decoded piece by piece; None:
                see `longest_piece`.
            prompt: typed text before each recording, where the mission has that.
            mission: which of several; None is the first.
            search: fields of `rwkv_speech.options.DecodingOptions`: `beam=4`, `max_new_tokens=100`, ...

        Raises:
            AudioError: a recording that can't be used.
        """
        audio = [a if isinstance(a, str | Path) else check_waveform(a, f"audio {i}") for i, a in enumerate(audio)]
        seconds = [len(a) / SAMPLE_RATE if isinstance(a, Tensor) else duration(a) for a in audio]
        order = sorted(range(len(audio)), key=seconds.__getitem__)
        found = self.transcripts(
            (audio[i] for i in order),
            batch_size=batch_size,
            max_audio_s=max_audio_s,
            options=DecodingOptions(**search),
            prompt=prompt,
            mission=mission,
        )
        texts = [""] * len(audio)
        for i, transcript in zip(order, found, strict=True):
            if isinstance(transcript, AudioError):
                raise transcript
            texts[i] = transcript.text
        return texts

    def transcripts(
        self,
        audio: Iterable[str | Path | Tensor],
        *,
        batch_size: int = 8,
        max_audio_s: float | None = None,
        options: DecodingOptions = DecodingOptions(),
        prompt: str | None = None,
        mission: str | None = None,
    ) -> Iterator[Transcript | AudioError]:
        """As `transcribe`, with times and scores, one by one, and with an error in the place of a bad recording.

        prompt, mission: as there.

        Batches are filled in the order of the recordings; a transcript comes out as soon as it is complete. Of a beam
        search, each segment has up to `options.n_best` alternatives.
        """

        number = itertools.count()  # of the segment, over all batches: what sampling draws depends on it

        def decode_waveforms(waveforms: Sequence[Tensor]) -> list[list[Alternative]]:
            rows = (Row(str(next(number)), None, wave, prompt=prompt, mission=mission) for wave in waveforms)
            results = self.decode(self.prepare([self.sample(row) for row in rows]).to(self.device), options)
            return [self.alternatives(result) for result in results]

        return transcripts(
            audio,
            decode_waveforms,
            batch_size=batch_size,
            max_seconds=self.longest_piece(max_audio_s, mission),
            cut_longer=self.task(mission).mission.cut,
        )

    def longest_piece(self, asked: float | None = None, mission: str | None = None) -> float:
        """Seconds of audio that are decoded in one go: those asked for, else the longest that it was trained on, or 30
        where that isn't known. Where longer audio is not cut, 30 at least.

        Of audio that is much longer than what it was trained on, a model says the beginning and loses the rest.
        """
        task = self.task(mission)
        return asked or max(1.0 if task.mission.cut else MAX_AUDIO_S, task.trained_audio_s or MAX_AUDIO_S)

    def alternatives(self, result: DecodingResult) -> list[Alternative]:
        """Best first, each text once: several rows of tokens may spell the same."""
        found: dict[str, Alternative] = {}
        for x in (result, *result.alternatives):
            text = self.text(x)
            found.setdefault(
                text, Alternative(text=text, average_log_prob=x.average_log_prob, probability=x.probability)
            )
        return list(found.values())


def _version(package: str) -> str | None:
    """None where it runs from its folder without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
