"""Pretrains the tiny speech encoder: a small WavLM that spells what it hears, by CTC, from made-up speech.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 demo/tiny/make/make_encoder.py --scratch FOLDER --work WORK

`FOLDER` is what `make_corpus.py --scratch` wrote. The spelling head is dropped: the encoder's last layer is one linear
step away from letters, which is what an adapter needs of it. `WORK` gets a log and, every few hundred steps, a
checkpoint; the same command goes on from it after an interruption. Processes share the work of a step: their number
changes its batch.
"""

import argparse
import copy
import json
import logging
import math
import os
import time
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soxr
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_speech.speech.audio import SAMPLE_RATE, load_audio
from rwkv_speech.speech.encoder import SpeechEncoder, frame_count, import_transformers, quiet, shortest_input

TINY = Path(__file__).parents[1]
SEED = 1
ALPHABET = "_ 'abcdefghijklmnopqrstuvwxyz"  # the first one is CTC's blank

SIZES = {
    "conv_dim": (128, 128, 128, 128),
    "conv_kernel": (160, 5, 3, 3),
    "conv_stride": (40, 2, 2, 2),  # 50 frames/s
    "num_feat_extract_layers": 4,
    "feat_extract_norm": "group",
    "feat_extract_activation": "relu",  # GELU would take a quarter of the time
    "hidden_act": "relu",
    "do_stable_layer_norm": True,
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "num_conv_pos_embeddings": 32,
}
CONVOLUTIONS = list(zip(SIZES["conv_kernel"], SIZES["conv_stride"], strict=True))
REGULAR = {
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "final_dropout"), 0.0),
    **dict.fromkeys(("feat_proj_dropout", "layerdrop"), 0.0),
}

# CTC alone takes hours to make convolutions hear. So they begin as band-pass filters, and first learn to tell the
# spectrogram; they go on telling it, ever less, while the whole learns to spell.
PHASES = 4  # filters per band, a quarter of a turn apart: rectified, they add up to the band's envelope
MELS, MEL_WINDOW, MEL_FLOOR = 40, 400, 1e-3
LISTENING = 0.03  # part of the run

BATCH = 12.0  # s of audio, in each process
POOL = 256  # utterances that a batch of similar lengths is picked from
SPEED = (0.95, 1.05)
NOISE_PART, SNR_DB = 0.2, (15.0, 40.0)

STEPS = 15_000
LEARNING_RATE, WARMUP = 1e-3, 0.03  # the peak; the part of the run on the way to it; from there in a line to zero
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.01, 1.0
REPORT = 1000  # steps between checkpoints

ALONE = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # without torchrun

log = logging.getLogger("make_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="utterances, by make_corpus.py --scratch")
    parser.add_argument("--work", type=Path, required=True, help="folder of the log and the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=TINY / "wavlm-tiny")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(options.work / "log.txt")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    dist.init_process_group("gloo", **({} if "RANK" in os.environ else ALONE))
    train(options.scratch, options.work / "checkpoint.pt", options.steps, options.out)


def train(scratch: Path, checkpoint: Path, steps: int, out: Path) -> None:
    """Each report leaves a checkpoint and an encoder to use."""
    torch.manual_seed(SEED)
    model, extractor = build()
    optimiser = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        step = saved["step"]
        log.info("goes on after step %d", step)
    validation = read_manifest(TINY / "corpus" / "valid.jsonl")
    speech = SpeechDataset(scratch)
    while step < steps:
        began, first, audio, losses = time.monotonic(), step, 0, []
        for step in range(first + 1, min(first + REPORT, steps) + 1):
            progress = step / steps
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * schedule(progress)
            waveforms, texts = speech.batch(step * dist.get_world_size() + dist.get_rank())
            optimiser.zero_grad()
            spelling, listening = losses_of(model, extractor, waveforms, texts, spell=progress > LISTENING)
            (spelling + (1 - progress) * listening).backward()
            average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            losses.append((spelling.item(), listening.item()))
            audio += sum(map(len, waveforms)) * dist.get_world_size()
        if dist.get_rank():
            continue
        passed = time.monotonic() - began
        heard = transcribe(model, extractor, [waveform for waveform, _ in validation])
        written = [text for _, text in validation]
        log.info(
            "step %d: losses %.3f %.3f, valid CER %.2f %% WER %.2f %%, %.0f ms a step, %.0f x real time",
            *(step, *np.mean(losses, 0), 100 * jiwer.cer(written, heard), 100 * jiwer.wer(written, heard)),
            *(1000 * passed / (step - first), audio / SAMPLE_RATE / passed),
        )
        log.info("  %r heard as %r", written[-1], heard[-1])
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
        torch.save(state, temporary := checkpoint.with_suffix(".tmp"))
        os.replace(temporary, checkpoint)
        export(model, extractor, out)
    if dist.get_rank() == 0:
        encoder = SpeechEncoder.from_pretrained(str(out))
        heard = [spell(model["spell"](encoder([torch.from_numpy(waveform)])[0])[0]) for waveform, _ in validation]
        log.info("read back from %s: CER %.2f %%", out, 100 * jiwer.cer([text for _, text in validation], heard))


def average_gradients(model: nn.Module) -> None:
    """Over the processes; a parameter without a gradient counts as zero."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    total = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(total)
    parts = (total / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.grad = part.view_as(parameter)


def build() -> tuple[nn.Module, Any]:
    """The network with its two heads, for spelling and for the spectrogram; and its feature extractor."""
    transformers = import_transformers()
    config = transformers.WavLMConfig(**SIZES, **REGULAR)
    wavlm = transformers.WavLMModel(config)
    wavlm.feature_extractor._requires_grad = False  # else the samples get a gradient, a quarter of the time; weights do
    filters = wavlm.feature_extractor.conv_layers[0].conv.weight
    filters.data = band_passes(filters.shape[0] // PHASES, filters.shape[2])
    mel = nn.Sequential(nn.LayerNorm(config.conv_dim[-1]), nn.Linear(config.conv_dim[-1], MELS))
    model = nn.ModuleDict({"wavlm": wavlm, "spell": nn.Linear(config.hidden_size, len(ALPHABET)), "mel": mel})
    return model, transformers.Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE, do_normalize=True)


def band_passes(bands: int, samples: int) -> Tensor:
    """Tones under a Hann window, evenly spaced in mel: (bands * PHASES, 1, samples)."""
    low, high = (2595 * np.log10(1 + f / 700) for f in (100.0, 7400.0))
    tones = 700 * (10 ** (np.linspace(low, high, bands) / 2595) - 1)  # Hz
    turns = tones[:, None, None] * np.arange(samples) / SAMPLE_RATE + np.arange(PHASES)[:, None] / PHASES
    window = np.hanning(samples + 2)[1:-1]
    return torch.from_numpy(window / window.sum() * np.cos(2 * np.pi * turns)).float().reshape(-1, 1, samples)


def schedule(progress: float) -> float:
    """Part of the peak learning rate, after so much of the run."""
    if progress < LISTENING:
        return 1.0
    return min((progress - LISTENING) / WARMUP, (1 - progress) / (1 - LISTENING - WARMUP))


def losses_of(
    model: nn.ModuleDict, extractor: Any, waveforms: list[np.ndarray], texts: list[str], *, spell: bool
) -> tuple[Tensor, Tensor]:
    """CTC loss per letter (or zero), and the mean squared error of the spectrogram, which has variance 1."""
    wavlm = model["wavlm"].train()
    inputs = extractor(waveforms, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt").input_values
    lengths = torch.tensor([frame_count(len(waveform), CONVOLUTIONS) for waveform in waveforms])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, F)
    mels = torch.cat([mel_spectrogram(*pair) for pair in zip(inputs, lengths.tolist(), strict=True)])
    with torch.autocast("cpu", torch.bfloat16):
        # GroupNorm sees the padding, as it won't when the encoder is used: little of it, lengths being alike.
        features = wavlm.feature_extractor(inputs).transpose(1, 2)  # (B, F, channels)
        listening = (model["mel"](features[mask]).float() - mels).square().mean()
        if not spell:
            return torch.zeros(()), listening
        hidden, _ = wavlm.feature_projection(features)
        logits = model["spell"](wavlm.encoder(hidden, attention_mask=mask).last_hidden_state)
    letters = torch.tensor([ALPHABET.index(letter) for text in texts for letter in text])
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)  # (F, B, letters)
    written = torch.tensor([len(text) for text in texts])
    return F.ctc_loss(log_probabilities, letters, lengths, written, zero_infinity=True), listening


def normalised(extractor: Any, waveform: np.ndarray) -> Tensor:
    """(samples,) -> (1, samples)"""
    return extractor(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values


def mel_spectrogram(samples: Tensor, frames: int) -> Tensor:
    """(samples,) -> (F, MELS), logarithmic, each band of mean 0 and variance 1: windows amid what a frame hears."""
    offset = (shortest_input(CONVOLUTIONS) - MEL_WINDOW) // 2
    hop = math.prod(SIZES["conv_stride"])
    windows = samples[offset:].unfold(0, MEL_WINDOW, hop)[:frames] * torch.hann_window(MEL_WINDOW)
    energy = torch.fft.rfft(windows.float(), 512).abs().square() @ mel_bank()
    bands = (energy + MEL_FLOOR).log()
    return (bands - bands.mean(0)) / bands.std(0)


@cache
def mel_bank() -> Tensor:
    """(257 frequencies, MELS)"""
    make = import_transformers().audio_utils.mel_filter_bank
    return torch.from_numpy(make(257, MELS, 60.0, 7600.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")).float()


@torch.no_grad()
def transcribe(model: nn.ModuleDict, extractor: Any, waveforms: list[np.ndarray]) -> list[str]:
    """The likeliest letter of each frame, without a language model."""
    wavlm = model["wavlm"].eval()
    frames = (wavlm(normalised(extractor, waveform)).last_hidden_state[0] for waveform in waveforms)
    return [spell(model["spell"](x)) for x in frames]


def spell(logits: Tensor) -> str:
    """(F, letters) -> text: repeated letters are one, unless a blank stands between them."""
    letters = (ALPHABET[best] for best, _ in groupby(logits.argmax(-1).tolist()))
    return " ".join("".join(letter for letter in letters if letter != ALPHABET[0]).split())


def export(model: nn.ModuleDict, extractor: Any, folder: Path) -> None:
    """The encoder alone, in fp16, as a Hugging Face folder."""
    with quiet():
        copy.deepcopy(model["wavlm"]).half().save_pretrained(folder)
    extractor.save_pretrained(folder)


def read_manifest(manifest: Path) -> list[tuple[np.ndarray, str]]:
    entries = map(json.loads, manifest.read_text(encoding="utf-8").splitlines())
    return [(load_audio(manifest.parent / entry["audio"]).numpy(), entry["text"]) for entry in entries]


class SpeechDataset:
    """The utterances of a folder, left on the disk."""

    def __init__(self, folder: Path) -> None:
        self.texts: list[str] = []
        self.waves: list[np.ndarray] = []
        for index in sorted(folder.glob("*.json")):
            found = json.loads(index.read_text(encoding="utf-8"))
            samples = np.load(index.with_suffix(".npy"), mmap_mode="r")
            self.texts += found["texts"]
            self.waves += np.split(samples, found["ends"][:-1])

    def batch(self, step: int) -> tuple[list[np.ndarray], list[str]]:
        """The waveforms of a step, each changed a little, and their texts."""
        draw = np.random.default_rng((SEED, step))
        pool = sorted(draw.choice(len(self.texts), POOL, replace=False), key=lambda i: len(self.waves[i]))
        at = draw.integers(POOL)
        count = max(1, round(BATCH * SAMPLE_RATE / len(self.waves[pool[at]])))
        first = max(0, min(at - count // 2, POOL - count))
        chosen = pool[first : first + count]
        speed = draw.uniform(*SPEED)  # the same for all, so that there is little padding
        return [changed(self.waves[i], speed, draw) for i in chosen], [self.texts[i] for i in chosen]


def changed(samples: np.ndarray, speed: float, draw: np.random.Generator) -> np.ndarray:
    """int16 samples -> float32, at another speed and now and then in noise; levels are the extractor's affair."""
    wave = soxr.resample(samples.astype(np.float32) / 32768, SAMPLE_RATE * speed, SAMPLE_RATE, "MQ")
    if draw.random() < NOISE_PART:
        level = np.sqrt(np.mean(wave**2)) * 10 ** (-draw.uniform(*SNR_DB) / 20)
        wave = wave + level * draw.standard_normal(len(wave), dtype=np.float32)
    return wave


if __name__ == "__main__":
    main()
