"""SpeechRWKV: a frozen speech encoder, a trained adapter, a frozen RWKV-6 and its trained initial state, joined.

    RWKV([initial state], [adapter](encoder(audio)), "#") -> transcript, end of text

What stands in brackets is trained. Usable from a notebook (`transcribe`, `loss`) and by Lightning's Trainer.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rwkv_speech.alignment import alignment_loss_sum
from rwkv_speech.data.batches import Batch
from rwkv_speech.decoding import DecodingResult, decode, default_max_new_tokens
from rwkv_speech.learning import Alignment, Optimisation, StepStats
from rwkv_speech.lm.rwkv6 import RWKV6
from rwkv_speech.lm.tokenizer import END_OF_TEXT, Tokenizer
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, check_waveform, duration
from rwkv_speech.speech.augmentation import SpecAugment
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.frame_cache import AbsentEncoder
from rwkv_speech.trained import ADAPTER, STATE, MissionFile, MissionFileError, read_mission_file
from rwkv_speech.transcription import Alternative, Transcript, transcripts

log = logging.getLogger("rwkv_speech")

DEFAULT_ENCODER = "microsoft/wavlm-large"
DOWNSAMPLE_K = 5
ADAPTER_HIDDEN = 2048
Mask = Callable[[Tensor, Tensor], Tensor]
SEPARATOR_ID = 36  # id of "#", which stands between the audio and the transcript


class SpeechRWKV(pl.LightningModule):
    """See the module's text. Only `adapter` and the language model's `time_state`s take gradients."""

    def __init__(self, language_model: RWKV6, speech_encoder: SpeechEncoder | AbsentEncoder, adapter: Adapter) -> None:
        super().__init__()
        self.language_model = language_model
        self.speech_encoder = speech_encoder
        self.adapter = adapter
        self.tokenizer = Tokenizer(language_model.sizes.vocab_size)
        self.optimisation = Optimisation()
        self.alignment = Alignment()
        self.spec_augment: SpecAugment | None = None  # of training
        self.stop_asked = False  # set by a signal, told to all processes by the next step
        self.on_nonfinite: Callable[[int, list[str]], None] = lambda step, ids: None
        self.totals: StepStats | None = None  # of the last micro-batch
        self.strict_loading = False  # a resume point holds what is trained, not the frozen parts
        for block in language_model.blocks:
            block.att.time_state.requires_grad_()

    @classmethod
    def from_pretrained(
        cls,
        load_model: str | Path,
        *,
        encoder: str | None = None,
        adapter: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        downsample_k: int | None = None,
        adapter_hidden: int | None = None,
        load_encoder: Callable[..., SpeechEncoder | AbsentEncoder] = SpeechEncoder.from_pretrained,
    ) -> "SpeechRWKV":
        """Loads the frozen parts, and the trained ones from a mission file.

        Args:
            load_model: an RWKV-6 weight file, .pth or .safetensors.
            encoder: a Hugging Face name or folder; None is the one that the mission file names, or WavLM-large.
            adapter: a mission file; None starts from torch's initialisation of the adapter and the model's own
                initial state (zero, unless its file holds one).
            device: where to compute.
            dtype: of the frozen parts and of computation; None is that of the model's file. Trained weights are fp32.
            downsample_k: encoder frames to a position; None is what the mission file tells, or 5.
            adapter_hidden: hidden units of the adapter; None is what the mission file tells, or 2048.
            load_encoder: called as `SpeechEncoder.from_pretrained` is; `FrameCache.encoder` where frames are cached.

        Raises:
            UserError: a file or encoder that can't be read, or parts that don't fit each other.
        """
        mission = read_mission_file(adapter) if adapter is not None else None
        info = mission.info if mission else {}
        named = info.get("encoder")
        if encoder and named and encoder != named:
            log.warning("%s was trained with the encoder %s, not %s", mission.path, named, encoder)
        language_model = RWKV6.from_file(load_model, device=device, dtype=dtype)
        with torch.random.fork_rng([]):  # a new adapter is the same, whether the encoder needs loading or not
            speech_encoder = load_encoder(
                encoder or named or DEFAULT_ENCODER, device=device, dtype=language_model.dtype
            )
        if mission:
            _check_fit(mission, language_model, speech_encoder, downsample_k, adapter_hidden)
            downsample_k, adapter_hidden = mission.inputs // speech_encoder.width, mission.hidden
        bridge = Adapter(
            speech_encoder.width,
            language_model.sizes.n_embd,
            downsample_k=downsample_k or DOWNSAMPLE_K,
            hidden=adapter_hidden or ADAPTER_HIDDEN,
        )
        model = cls(language_model, speech_encoder, bridge.to(device))
        if mission:
            model.load_mission(mission)
        return model

    def trainable_state_dict(self) -> dict[str, nn.Parameter]:
        """The trained parameters themselves, under the names of a mission file."""
        blocks = self.language_model.blocks
        states = {STATE.format(i): block.att.time_state for i, block in enumerate(blocks)}
        return states | {f"{ADAPTER}{name}": x for name, x in self.adapter.layers.named_parameters()}

    def describe(self, **more: Any) -> dict[str, Any]:
        """What a reader of a mission file must know beside its weights, and `more`."""
        sizes = self.language_model.sizes
        return {
            "encoder": self.speech_encoder.name,
            "encoder_width": self.speech_encoder.width,
            "downsample_k": self.adapter.downsample_k,
            "adapter_hidden": self.adapter.layers[0].out_features,
            "n_layer": sizes.n_layer,
            "n_embd": sizes.n_embd,
            "head_size": sizes.head_size,
            "vocab_size": sizes.vocab_size,
            "versions": {name: metadata.version(name) for name in ("rwkv-speech", "torch", "transformers")},
        } | more

    @torch.no_grad()
    def load_mission(self, mission: MissionFile) -> None:
        """Takes over the trained tensors of a mission file that fits."""
        for name, parameter in self.trainable_state_dict().items():
            parameter.copy_(mission.tensors[name])

    def positions(self, samples: int, text: str) -> int:
        """Positions that an utterance of so many samples takes with its transcript: frames, "#", tokens."""
        groups = self.adapter.group_count(self.speech_encoder.frame_count(samples))
        return groups + 1 + len(self.tokenizer.encode(text))

    def hear(self, audio: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Waveforms (samples,) at 16 kHz, or the frames (F, width) that they gave the encoder -> frames
        (B, F_max, width) and the valid ones (B,) of each."""
        if audio[0].ndim == 1:
            frames, lengths = self.speech_encoder(audio)
        else:
            device = self.adapter.layers[0].weight.device
            lengths = torch.tensor([len(frames) for frames in audio], device=device)
            frames = pad_sequence([frames.to(device) for frames in audio], batch_first=True)
        return frames.to(self.language_model.dtype), lengths

    def embed_audio(self, audio: Sequence[Tensor], *, mask: Mask | None = None) -> tuple[Tensor, Tensor]:
        """Audio as `hear` takes it -> embeddings (B, G, n_embd) and the valid positions (B,) of each.

        mask: makes other frames (B, F, width) of the encoder's, given those and the valid ones (B,) of each.
        """
        frames, lengths = self.hear(audio)
        return self.adapter(frames if mask is None else mask(frames, lengths), lengths)

    def loss_sum(
        self, audio: Sequence[Tensor], texts: Sequence[str], *, mask: Mask | None = None
    ) -> tuple[Tensor, int]:
        """The cross-entropy summed over transcript tokens and ends of text (fp32 scalar), and how many they are.

        Audio and mask are taken as by `embed_audio`.
        """
        return self._text_loss_sum(*self.embed_audio(audio, mask=mask), texts)

    def _text_loss_sum(self, heard: Tensor, lengths: Tensor, texts: Sequence[str]) -> tuple[Tensor, int]:
        tokens = [
            torch.tensor([SEPARATOR_ID, *self.tokenizer.encode(text), END_OF_TEXT], device=heard.device)
            for text in texts
        ]
        embedded = [self.language_model.embed(t[:-1]) for t in tokens]
        x = pad_sequence([torch.cat([a[:n], e]) for a, n, e in zip(heard, lengths, embedded, strict=True)], True)
        hidden, _ = self.language_model(x)
        # Logits only where a transcript token or the end is to be told: from "#" on.
        told = torch.cat([h[n : n + len(e)] for h, n, e in zip(hidden, lengths, embedded, strict=True)])
        targets = torch.cat([t[1:] for t in tokens])
        logits = self.language_model.logits(told).float()
        return F.cross_entropy(logits, targets, reduction="sum"), len(targets)

    def _training_losses(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Summed cross-entropy and summed CTC loss of a batch; None for what this step doesn't compute."""
        if not len(batch):
            return None, None
        mask = self.spec_augment and partial(self.spec_augment, ids=batch.ids, epoch=batch.epoch)
        heard, lengths = self.embed_audio(batch.audio, mask=mask)
        text = ctc = None
        if not self.alignment.weight or self.trainer.global_step >= self.alignment.alone_steps:
            text, _ = self._text_loss_sum(heard, lengths, batch.texts)
        if self.alignment.weight:
            tokens = [torch.tensor(self.tokenizer.encode(t), device=heard.device) for t in batch.texts]
            ctc = alignment_loss_sum(heard, lengths, tokens, self.language_model.emb.weight)
        return text, ctc

    def loss(self, waveforms: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Cross-entropy averaged over transcript tokens and ends of text, differentiable in adapter and state.

        Args:
            waveforms: 1-D float arrays at 16 kHz.
            texts: their transcripts.
        """
        total, count = self.loss_sum([check_waveform(w, f"waveform {i}") for i, w in enumerate(waveforms)], texts)
        return total / count

    @torch.no_grad()
    def decode_waveforms(
        self,
        audio: Sequence[Tensor],
        *,
        beam: int = 1,
        max_new_tokens: int | None = None,
        loop_guard: bool = False,
        n_best: int = 1,
    ) -> list[DecodingResult]:
        """One batch of audio, taken as by `hear` -> what is said in each; see `decoding.decode`."""
        heard, lengths = self.embed_audio(audio)
        turn = self.language_model.embed(torch.tensor([SEPARATOR_ID], device=heard.device))
        x = pad_sequence([torch.cat([a[:n], turn]) for a, n in zip(heard, lengths, strict=True)], True)
        rate = SAMPLE_RATE if audio[0].ndim == 1 else self.speech_encoder.frame_rate
        limits = [max_new_tokens or default_max_new_tokens(len(a) / rate) for a in audio]
        search = {"beam": beam, "n_best": n_best, "loop_guard": loop_guard}
        return decode(self.language_model, x, lengths + 1, max_new_tokens=limits, **search)

    def transcribe(
        self,
        audio: Sequence[str | Path | Tensor],
        *,
        batch_size: int = 8,
        max_audio_s: float = 30.0,
        beam: int = 1,
        max_new_tokens: int | None = None,
        loop_guard: bool = False,
    ) -> list[str]:
        """Transcripts of recordings, in their order.

        Args:
            audio: paths, or 1-D float arrays at 16 kHz.
            batch_size: how many are decoded together; recordings of like length share a batch.
            max_audio_s: longer recordings are cut in pauses, as `segments.cut` tells, and decoded piece by piece.
            beam: beams; 1 is greedy.
            max_new_tokens: longest transcript in tokens; None: 50 per second of audio, and at least 100.
            loop_guard: cut a transcript that has begun to repeat itself.

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
            beam=beam,
            max_new_tokens=max_new_tokens,
            loop_guard=loop_guard,
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
        max_audio_s: float = 30.0,
        beam: int = 1,
        max_new_tokens: int | None = None,
        loop_guard: bool = False,
        n_best: int = 1,
    ) -> Iterator[Transcript | AudioError]:
        """As `transcribe`, with times and scores, one by one, and with an error in the place of a bad recording.

        Batches are filled in the order of the recordings; a transcript comes out as soon as it is complete. Of a beam
        search, each passage has up to `n_best` readings, at most `beam`.
        """
        search = {"beam": beam, "n_best": n_best, "max_new_tokens": max_new_tokens, "loop_guard": loop_guard}

        def say(waveforms: Sequence[Tensor]) -> list[list[Alternative]]:
            return [self._readings(decoded) for decoded in self.decode_waveforms(waveforms, **search)]

        return transcripts(audio, say, batch_size=batch_size, max_seconds=max_audio_s)

    def _readings(self, decoded: DecodingResult) -> list[Alternative]:
        """Best first, each text once: several rows of tokens may spell the same."""
        scores: dict[str, float] = {}
        for reading in (decoded, *decoded.alternatives):
            scores.setdefault(self.tokenizer.decode(reading.tokens).strip(), reading.average_log_prob)
        return [Alternative(text=text, average_log_prob=score) for text, score in scores.items()]

    # What Lightning's Trainer calls

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Mean loss over the tokens of the optimiser step that this batch belongs to, in all processes.

        With the alignment's loss, times its weight, where that takes part.
        """
        text, ctc = self._training_losses(batch)
        loss_sum, ctc_sum = (0.0 if part is None else float(part.detach()) for part in (text, ctc))
        finite = math.isfinite(loss_sum + ctc_sum)
        here = StepStats(
            loss_sum=loss_sum if finite else 0.0,
            tokens=0 if text is None else batch.tokens,
            ctc_sum=ctc_sum if finite else 0.0,
            ctc_tokens=0 if ctc is None else batch.tokens,
            step_tokens=batch.step_tokens,
            utterances=len(batch),
            seconds=batch.seconds,
            nonfinite=not finite,
            stop=self.stop_asked,
        )
        everywhere = torch.tensor(astuple(here), dtype=torch.float64, device=self.device)
        self.totals = StepStats(*self.trainer.strategy.reduce(everywhere, reduce_op="sum").tolist())
        if self.totals.nonfinite:
            self.on_nonfinite(self.trainer.global_step + 1, [] if finite else batch.ids)
            self.totals = replace(self.totals, loss_sum=0.0, tokens=0.0, ctc_sum=0.0, ctc_tokens=0.0)
            text = ctc = None
        total = torch.zeros((), device=self.device) if text is None else text
        if ctc is not None:
            total = total + self.alignment.weight * ctc
        if text is None:  # the other processes and the optimiser still expect all gradients
            total = total + sum(p.sum() for p in self.trainable_state_dict().values()) * 0.0
        # Lightning divides by the accumulated micro-batches, the strategy by the processes: both are undone here.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return total * (scale / max(1.0, self.totals.step_tokens))

    def configure_optimizers(self) -> dict:
        plan = self.optimisation
        matrices = [self.adapter.layers[i].weight for i in (0, 2)]
        biases = [self.adapter.layers[i].bias for i in (0, 2)]
        states = [block.att.time_state for block in self.language_model.blocks]
        groups = [
            {"params": matrices, "weight_decay": plan.weight_decay, "name": "adapter"},
            {"params": biases, "name": "adapter biases"},
            {"params": states, "lr": plan.lr_init * plan.state_lr_scale, "name": "state"},
        ]
        optimizer = torch.optim.AdamW(groups, lr=plan.lr_init, betas=plan.betas, eps=plan.eps, weight_decay=0.0)
        total = plan.total_steps or int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: plan.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch  # feature extractors work on the CPU; the encoder moves what it makes of the waveforms

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in trained}


def _check_fit(
    mission: MissionFile,
    model: RWKV6,
    encoder: SpeechEncoder | AbsentEncoder,
    downsample_k: int | None,
    hidden: int | None,
) -> None:
    """One error that names everything in which the mission file and the parts around it differ."""
    sizes = model.sizes
    state_shape = (sizes.n_head, sizes.head_size, sizes.head_size)
    of_model = f"language model is {sizes.n_layer} x {sizes.n_embd}"
    problems = []
    state = tuple(mission.tensors[STATE.format(0)].shape)
    if mission.n_layer != sizes.n_layer or state != state_shape:
        problems.append(f"states of {mission.n_layer} layers x {state}, but the {of_model}, states {state_shape}")
    out = mission.tensors[f"{ADAPTER}2.weight"].shape[0]
    if out != sizes.n_embd:
        problems.append(f"an adapter to width {out}, but the {of_model}")
    told_k = mission.info.get("downsample_k")
    for k, where in ((told_k, "its JSON file says"), (downsample_k, "--downsample_k is")):
        if k and k * encoder.width != mission.inputs:
            problems.append(
                f"an adapter from {mission.inputs} inputs, but {where} K = {k} and encoder {encoder.name} has width "
                f"{encoder.width}"
            )
    if not told_k and not downsample_k and mission.inputs % encoder.width:
        problems.append(
            f"an adapter from {mission.inputs} inputs, no multiple of encoder {encoder.name}'s width {encoder.width}"
        )
    if hidden and hidden != mission.hidden:
        problems.append(f"{mission.hidden} hidden units, but --adapter_hidden is {hidden}")
    if problems:
        raise MissionFileError(f"mission file {mission.path} does not fit: it holds {'; it holds '.join(problems)}")
