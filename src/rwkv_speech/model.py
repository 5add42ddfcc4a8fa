"""SpeechRWKV: a frozen speech encoder, a trained adapter, a frozen RWKV and its trained initial state, joined.

    RWKV([initial state], [adapter](encoder(audio)), "#") -> answer, end of text

What stands in brackets is trained. A plain module: usable from a notebook (`transcribe`, `loss`), and by the engine,
which holds it and knows how to train it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rwkv_speech import lm
from rwkv_speech.data.batches import Batch, Collate, SpeechDataset
from rwkv_speech.data.rendering import Renderer
from rwkv_speech.data.sample import Row, Sample
from rwkv_speech.decoding import DecodingResult, choose, decode
from rwkv_speech.errors import UserError
from rwkv_speech.lm.language_model import LanguageModel
from rwkv_speech.lm.tokenizer import Tokenizer
from rwkv_speech.missions import MISSIONS, get_mission
from rwkv_speech.options import DecodingOptions
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, check_waveform, duration
from rwkv_speech.speech.augmentation import apply_masks
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.frame_cache import AbsentEncoder
from rwkv_speech.speech.hub import encoder_folder
from rwkv_speech.speech.identity import encoder_digest
from rwkv_speech.trained import (
    MissionFile,
    MissionFileError,
    TrainedTensor,
    check_fit,
    chosen_encoder,
    read_mission_file,
    read_states,
    trained_tensors,
)
from rwkv_speech.transcription import Alternative, Transcript, transcripts

DEFAULT_ENCODER = "microsoft/wavlm-large"
DOWNSAMPLE_K = 5
ADAPTER_HIDDEN = 2048
MAX_AUDIO_S = 30.0


class SpeechRWKV(nn.Module):
    """See the module's text. Only `adapter` and the language model's `time_state`s take gradients.

    mission: what is asked of the model, one of `rwkv_speech.missions`.
    labels: the texts that an answer is chosen from, where the mission chooses.
    trained_audio_s: the longest recording that it was trained on, in seconds, where its mission file says so.
    renderer: makes sequences of samples.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        speech_encoder: SpeechEncoder | AbsentEncoder,
        adapter: Adapter,
        *,
        mission: str = "transcribe",
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.speech_encoder = speech_encoder
        self.adapter = adapter
        self.mission = get_mission(mission)
        self.labels: list[str] | None = None
        self.trained_audio_s: float | None = None
        self.tokenizer = Tokenizer(language_model.sizes.vocab_size)
        self.renderer = Renderer(
            self.tokenizer, frame_count=speech_encoder.frame_count, group_count=adapter.group_count
        )
        for tensor in self.trained_tensors().values():
            tensor.parameter.requires_grad_()

    @classmethod
    def from_pretrained(
        cls,
        load_model: str | Path,
        *,
        encoder: str | None = None,
        adapter: str | Path | MissionFile | None = None,
        load_state: str | Path | None = None,
        mission: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        downsample_k: int | None = None,
        adapter_hidden: int | None = None,
        load_encoder: Callable[..., SpeechEncoder | AbsentEncoder] = SpeechEncoder.from_pretrained,
    ) -> "SpeechRWKV":
        """Loads the frozen parts, and the trained ones from a mission file.

        Args:
            load_model: an RWKV-6 or RWKV-7 weight file, .pth or .safetensors.
            encoder: a Hugging Face name or folder; None is the one that the mission file names, or WavLM-large.
            adapter: a mission file, or what was read of one; None starts from torch's initialisation of the adapter and
                the model's own initial state (zero, unless its file holds one).
            load_state: a file of initial states alone, as RWKV-PEFT writes it; they replace those of `adapter`.
            mission: what is asked of the model; None is what the mission file names, or "transcribe".
            device: where to compute.
            dtype: of the frozen parts and of computation; None is that of the model's file. Trained weights are fp32.
            downsample_k: encoder frames to a position; None is what the mission file says, or 5.
            adapter_hidden: hidden units of the adapter; None is what the mission file says, or 2048.
            load_encoder: called as `SpeechEncoder.from_pretrained` is; `FrameCache.encoder` where frames are cached.

        Raises:
            UserError: a file or encoder that can't be read, or parts that don't fit each other.
        """
        file = adapter if isinstance(adapter, MissionFile | None) else read_mission_file(adapter)
        info = file.info if file else {}
        mission = mission or info.get("mission") or "transcribe"
        if mission not in MISSIONS and mission == info.get("mission"):
            raise MissionFileError(f"mission file {file.path} names the mission {mission!r}, which is not known here")
        encoder = (chosen_encoder(file, encoder) if file else encoder) or DEFAULT_ENCODER
        encoder_folder(encoder)  # a wrong one is named at once, not when a large model has been read
        language_model = lm.load(load_model, device=device, dtype=dtype)
        with torch.random.fork_rng([]):  # a new adapter is the same, whether the encoder needs loading or not
            speech_encoder = load_encoder(encoder, device=device, dtype=language_model.dtype)
        if file:
            check_fit(file, language_model, speech_encoder, downsample_k, adapter_hidden)
            downsample_k, adapter_hidden = file.inputs // speech_encoder.width, file.hidden
        new_adapter = Adapter(
            speech_encoder.width,
            language_model.sizes.n_embd,
            downsample_k=downsample_k or DOWNSAMPLE_K,
            hidden=adapter_hidden or ADAPTER_HIDDEN,
        )
        model = cls(language_model, speech_encoder, new_adapter.to(device), mission=mission)
        if file:
            model.load_trained(file.tensors)
            model.labels = info.get("labels") if mission == info.get("mission") else None
            model.trained_audio_s = file.trained_audio_s
        if load_state is not None:
            model.load_trained(read_states(load_state, language_model.sizes))
        return model

    @property
    def device(self) -> torch.device:
        return self.adapter.layers[0].weight.device

    # What is trained

    def trained_tensors(self) -> dict[str, TrainedTensor]:
        """Everything that is trained, under its name in a mission file; see `rwkv_speech.trained`."""
        return trained_tensors(self.language_model, self.adapter)

    def trainable_state_dict(self) -> dict[str, nn.Parameter]:
        """The trained parameters themselves, under the names of a mission file."""
        return {name: tensor.parameter for name, tensor in self.trained_tensors().items()}

    def describe(self, **more: Any) -> dict[str, Any]:
        """What a reader of a mission file must know beside its weights, and `more`."""
        sizes = self.language_model.sizes
        folder = encoder_folder(self.speech_encoder.name)
        return {
            "mission": self.mission.name,
            **({"labels": self.labels} if self.labels else {}),
            "encoder": self.speech_encoder.name,
            **({"encoder_digest": encoder_digest(folder)} if folder else {}),
            "encoder_width": self.speech_encoder.width,
            "downsample_k": self.adapter.downsample_k,
            "adapter_hidden": self.adapter.layers[0].out_features,
            "generation": sizes.generation,
            "n_layer": sizes.n_layer,
            "n_embd": sizes.n_embd,
            "head_size": sizes.head_size,
            "vocab_size": sizes.vocab_size,
            "versions": {name: _version(name) for name in ("rwkv-speech", "torch", "transformers")},
        } | more

    @torch.no_grad()
    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over tensors, of shapes that fit, under their names in a mission file."""
        parameters = self.trainable_state_dict()
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)

    # From samples to hidden vectors

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples, as a loader's workers would make it.

        Raises:
            AudioError: audio that can't be used.
        """
        dataset = SpeechDataset(
            (), sample_of=self.mission.sample, renderer=self.renderer, extract=self.speech_encoder.extract
        )
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
        return self.adapter(self.encode(batch), batch.frame_lengths)

    def embed(self, batch: Batch, audio_embeds: Tensor) -> Tensor:
        """The sequences of a batch as embeddings (B, T, n_embd): those of its tokens, and of audio in its slots."""
        x = self.language_model.embed(batch.ids)
        valid = audio_embeds.flatten(0, 1).index_select(0, batch.audio_groups)
        return x.flatten(0, 1).index_copy_(0, batch.audio_slots, valid.to(x.dtype)).view_as(x)

    # What is made of them

    def loss_sum(self, batch: Batch, audio_embeds: Tensor | None = None) -> Tensor:
        """The cross-entropy summed over all labels of a batch, of which it has `batch.tokens`; fp32 scalar.

        batch: on the model's device.
        audio_embeds: where they are there already.
        """
        audio_embeds = self.embed_audio(batch)[0] if audio_embeds is None else audio_embeds
        hidden, _ = self.language_model(self.embed(batch, audio_embeds))
        # Logits only where something is asked.
        logits = self.language_model.logits(hidden.flatten(0, 1).index_select(0, batch.label_slots)).float()
        return F.cross_entropy(logits, batch.labels, reduction="sum")

    def loss(self, waveforms: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Cross-entropy averaged over answer tokens and ends of text, differentiable in adapter and state.

        Args:
            waveforms: 1-D float arrays at 16 kHz.
            texts: the answers: transcripts, say.
        """
        audio = [check_waveform(w, f"waveform {i}") for i, w in enumerate(waveforms)]
        rows = [Row(str(i), text, w) for i, (w, text) in enumerate(zip(audio, texts, strict=True))]
        samples = [self.mission.sample(row) for row in rows]
        batch = self.prepare(samples).to(self.device)
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
        audio_embeds = self.embed_audio(batch)[0] if audio_embeds is None else audio_embeds
        x = self.embed(batch, audio_embeds)[:, : int(batch.prompt_lengths.max())]
        if self.mission.chooses:
            if not self.labels:
                raise UserError(f"the mission {self.mission.name} chooses among labels: name them by --labels")
            return choose(self.language_model, x, batch.prompt_lengths, [*map(self.tokenizer.encode, self.labels)])
        limits = [options.max_new_tokens or self.mission.max_new_tokens(seconds) for seconds in batch.seconds]
        return decode(
            self.language_model,
            x,
            batch.prompt_lengths,
            max_new_tokens=limits,
            options=options,
            names=batch.names,
        )

    def text(self, result: DecodingResult) -> str:
        """The text of an answer."""
        return self.tokenizer.decode(result.tokens).strip()

    def transcribe(
        self,
        audio: Sequence[str | Path | Tensor],
        *,
        batch_size: int = 8,
        max_audio_s: float | None = None,
        prompt: str | None = None,
        **search: Any,
    ) -> list[str]:
        """Transcripts of recordings, in their order.

        Args:
            audio: paths, or 1-D float arrays at 16 kHz.
            batch_size: how many are decoded together; recordings of like length share a batch.
            max_audio_s: longer recordings are cut in pauses, as `segments.cut` does, and decoded piece by piece; None:
                see `longest_piece`.
            prompt: typed text before each recording, where the mission has that.
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
    ) -> Iterator[Transcript | AudioError]:
        """As `transcribe`, with times and scores, one by one, and with an error in the place of a bad recording.

        prompt: typed text before each recording, where the mission has that.

        Batches are filled in the order of the recordings; a transcript comes out as soon as it is complete. Of a beam
        search, each segment has up to `options.n_best` alternatives.
        """

        number = itertools.count()  # of the segment, over all batches: what sampling draws depends on it

        def decode_waveforms(waveforms: Sequence[Tensor]) -> list[list[Alternative]]:
            rows = (Row(str(next(number)), None, waveform, prompt=prompt) for waveform in waveforms)
            samples = [self.mission.sample(row) for row in rows]
            results = self.decode(self.prepare(samples).to(self.device), options)
            return [self.alternatives(result) for result in results]

        return transcripts(
            audio,
            decode_waveforms,
            batch_size=batch_size,
            max_seconds=self.longest_piece(max_audio_s),
            cut_longer=self.mission.cut,
        )

    def longest_piece(self, asked: float | None = None) -> float:
        """Seconds of audio that are decoded in one go: those asked for, else the longest that it was trained on, or 30
        where that isn't known. Where longer audio is not cut, 30 at least.

        Of audio that is much longer than what it was trained on, a model says the beginning and loses the rest.
        """
        return asked or max(1.0 if self.mission.cut else MAX_AUDIO_S, self.trained_audio_s or MAX_AUDIO_S)

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
