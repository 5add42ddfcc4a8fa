"""The groups of settings: plain dataclasses that the rest of the program takes apart."""

import math
import re
from dataclasses import dataclass
from typing import Any

from rwkv_speech.errors import UserError
from rwkv_speech.options.flags import (
    count,
    decibels,
    device_list,
    flag,
    name_list,
    peft_settings,
    positive,
    seconds,
    seconds_or_0,
    trained_parts,
)

QUANTS = ("int8", "nf4")  # see rwkv_speech.lm.quantised
# Those of the package peft whose weights can be written, read and merged. Of others they are integers, shared between
# layers, or lie elsewhere than beside matrices.
PEFT_METHODS = (
    *("lora", "dora", "rslora", "pissa", "olora", "miss", "adamss", "boft", "c3a", "deft", "delora", "fourierft"),
    *("gralora", "hira", "hra", "ia3", "loha", "lokr", "oft", "osf", "peanut", "psoft", "road", "waveft"),
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The frozen parts, and the trained one."""

    load_model: str | None = flag(
        None, "RWKV-6 or RWKV-7 weight file, .pth or .safetensors; all but score and most of export need it"
    )
    encoder: str | None = flag(
        None, "speech encoder: Hugging Face name or folder (default: the mission file's, or microsoft/wavlm-large)"
    )
    adapter: str | None = flag(
        None,
        "mission file, or OWNER/NAME of one on the Hugging Face hub, to train on from, or for eval and predict several "
        "of different missions joined by + (default: the best of the newest run in proj_dir)",
    )
    load_state: str | None = flag(
        None, "file of initial states alone, as RWKV-PEFT writes it, in place of the mission file's (default: none)"
    )
    load_peft: str | None = flag(
        None,
        "folder in the form of the library peft, or LoRA file of RWKV-PEFT, in place of the mission file's (default: "
        "none)",
    )
    peft_config: dict[str, Any] | None = flag(
        None,
        "settings of the method of peft that train_type names, as JSON or r=16,lora_alpha=32,target_modules=key+value; "
        "of a LoRA file of RWKV-PEFT its lora_alpha (default: the method's own; all matrices but the head)",
        type=peft_settings,
    )
    mission: str | None = flag(
        None,
        "what is asked of the model: transcribe, translate, answer, label, describe, converse (default: what the rows "
        "name, else the mission file's, else transcribe)",
    )
    labels: list[str] | None = flag(
        None,
        "with the mission label: what to choose from, joined by commas (default: what the mission file was trained "
        "with, in training all that the data has)",
        type=name_list,
    )
    downsample_k: int | None = flag(None, "encoder frames to a position (default: 5)", type=positive)
    adapter_hidden: int | None = flag(None, "hidden units of the adapter (default: 2048)", type=positive)
    n_layer: int | None = flag(None, "layers of the language model: a check, since the file has them", type=positive)
    n_embd: int | None = flag(None, "width of the language model: a check, since the file has it", type=positive)
    quant: str | None = flag(
        None,
        "how the language model's large matrices are kept: none, in the precision of computation, or packed into int8 "
        "or nf4 (default: as the mission file says, else none)",
        choices=("none", *QUANTS),
    )
    wkv: str = flag(
        "auto", "how the WKV operator is computed", choices=("auto", "cuda", "cpu", "torch"), resume_ignored=True
    )
    cuda_graphs: int = flag(
        1,
        "on a GPU, 1: a token is read as one CUDA graph, 0: operation by operation, slower, for less memory",
        choices=(0, 1),
        resume_ignored=True,
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where samples come from, and how they are read."""

    data: str = flag("librispeech", "librispeech, a manifest or table, a folder, or a Hugging Face dataset")
    data_dir: str | None = flag(None, "folder that holds LibriSpeech, or any folder in its layout")
    train_split: str | None = flag(
        None,
        "split or file to train on, several joined by +, of which each pass takes one :2 twice, or :0.5 a half "
        "(default for LibriSpeech: all 960 h; else all there is)",
    )
    valid_split: str | None = flag(
        None, "split to validate on while training, joined by + (default: no validation)", resume_ignored=True
    )
    eval_split: str | None = flag(
        None,
        "splits to evaluate, joined by +, a row each (default for LibriSpeech: test-clean+test-other)",
        resume_ignored=True,
    )
    audio_column: str | None = flag(None, "column of the audio in a dataset, table or manifest (default: guessed)")
    text_column: str | None = flag(None, "column of the transcript in a dataset, table or manifest (default: guessed)")
    download: bool = flag(False, "fetch the LibriSpeech splits that data_dir lacks")
    on_bad_audio: str = flag(
        "stop",
        "a sample that can't be used stops the run, or is left out",
        choices=("stop", "skip"),
        resume_ignored=True,
    )
    cache_features: str | None = flag(
        None,
        "train: folder that keeps the encoder's frames, computed once (with --speed_perturb once for each speed) and "
        "read ever after (default: none)",
        op="train",
    )
    cache_dtype: str = flag(
        "fp16", "how frames are kept; int8, with a scale for each, halves the disk", choices=("fp16", "int8")
    )
    num_workers: int = flag(2, "processes that read audio, for each device", type=count, resume_ignored=True)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the trained parts learn; the defaults are those of the published recipe."""

    train_type: str = flag(
        "adapter+state",
        "what is trained: adapter, state, and a method of the package peft, some of these joined by +; without the "
        f"adapter, beside that of a mission file, which stays as it is; methods: {', '.join(PEFT_METHODS)}",
        type=trained_parts,
    )
    share_adapter: int = flag(1, "1: where rows are of several missions, these have one adapter", choices=(0, 1))
    ctx_len: int = flag(
        2048,
        "longest sample in positions; a longer one is a bad sample, but a longer conversation is learnt in pieces",
        type=positive,
    )
    micro_bsz: int = flag(4, "utterances per device and step, alike in length", type=positive)
    max_batch_s: float | None = flag(
        None,
        "seconds of audio per device and step, padding included, instead of a number of utterances (default: none)",
        type=seconds,
    )
    accumulate_grad_batches: int = flag(1, "micro-batches to an optimiser step", type=positive)
    epoch_steps: int = flag(0, "optimiser steps to an epoch; 0: one pass over the data", type=count)
    epoch_count: int = flag(3, "epochs to train", type=positive)
    epoch_save: int = flag(1, "epochs between mission files", type=positive)
    save_steps: int = flag(1000, "optimiser steps between mission files, within an epoch; 0: none", type=count)
    valid_steps: int = flag(1000, "steps between validations, with valid_split", type=positive, resume_ignored=True)
    early_stop: int = flag(
        0,
        "end training after so many validations in which no mission's score got better; 0: never",
        type=count,
        resume_ignored=True,
    )
    average: int = flag(
        0,
        "also write the mean of so many latest mission files at the end, and keep them; 0: don't",
        type=count,
        resume_ignored=True,
    )
    on_nonfinite: str = flag(
        "stop",
        "a batch whose loss is NaN or infinite stops the run, or counts for nothing",
        choices=("stop", "skip"),
        resume_ignored=True,
    )
    lr_init: float = flag(1e-4, "learning rate after the warm-up")
    lr_final: float | None = flag(
        None, "learning rate at the end, reached exponentially (default: lr_init)", type=float
    )
    warmup_steps: int = flag(100, "optimiser steps from 0.2 of the learning rate to all of it", type=count)
    state_lr_scale: float = flag(1.0, "learning rate of the initial state, as a multiple of the adapter's")
    peft_lr_scale: float = flag(1.0, "learning rate of what peft puts beside the matrices, as such a multiple")
    ctc_align: float = flag(0.0, "weight of a CTC loss between adapter outputs and frozen embeddings; 0: none")
    ctc_align_steps: int = flag(0, "first optimiser steps by that loss alone, without the language model", type=count)
    beta1: float = flag(0.9, "AdamW's beta1")
    beta2: float = flag(0.99, "AdamW's beta2")
    adam_eps: float = flag(1e-8, "AdamW's epsilon")
    weight_decay: float = flag(0.0, "AdamW's weight decay, on the matrices of the adapter and of peft")
    grad_clip: float = flag(1.0, "norm that gradients are clipped to; 0: not at all")
    standardise: int = flag(
        0,
        "1: a new adapter reads frames whose channels have mean 0 and deviation 1, as measured before the first step; "
        "its mission files hold the same as an adapter of frames as they are",
        choices=(0, 1),
    )
    grad_cp: int = flag(0, "1: recompute each layer in the backward pass, for less memory", choices=(0, 1))
    compile: bool = flag(False, "train: fuse the language model's small operations by torch.compile, for speed on GPUs")
    random_seed: int = flag(42, "seed of the adapter's initial weights, data order and augmentation", type=count)
    speed_perturb: bool = flag(False, "train: each sample at 0.9, 1.0 or 1.1 speed, drawn anew in each epoch")
    spec_augment: bool = flag(False, "train: mask stretches of time and bands of channels of the encoder's frames")
    noise_dir: str | None = flag(None, "train: add noise, from the audio files of this folder (default: none)")
    noise_snr: list[float] | None = flag(
        None, "lowest and highest level of speech above that noise, in dB, as LOW,HIGH (default: 5,20)", type=decibels
    )
    wandb: str | None = flag(None, "Weights & Biases project to log to (default: none)", resume_ignored=True)

    def __post_init__(self) -> None:
        for name, rate in (("lr_init", self.lr_init), ("lr_final", self.lr_final)):
            if rate is not None and not rate > 0:  # so that nan is none either
                raise UserError(f"--{name} {rate} must be positive")
        if not 0 <= self.ctc_align < math.inf:
            raise UserError(f"--ctc_align {self.ctc_align} is a weight: expected 0 or more")
        if self.ctc_align and "adapter" not in self.parts:
            raise UserError(
                f"--ctc_align {self.ctc_align} teaches the adapter, which --train_type {self.train_type} leaves alone"
            )
        if self.ctc_align_steps and not self.ctc_align:
            raise UserError(f"--ctc_align_steps {self.ctc_align_steps} needs --ctc_align: the weight of that loss")
        if self.noise_snr and not self.noise_dir:
            raise UserError("--noise_snr needs --noise_dir: a folder with recordings of noise")

    @property
    def parts(self) -> list[str]:
        """What is trained: of adapter, state, and the name of a method of peft."""
        return self.train_type.split("+")

    @property
    def peft_method(self) -> str | None:
        return next((part for part in self.parts if part not in ("adapter", "state")), None)

    def lr_factor(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0 of `total`, as a multiple of lr_init."""
        if step < self.warmup_steps:
            return 0.2 + 0.8 * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total - 1 - self.warmup_steps)
        return ((self.lr_final or self.lr_init) / self.lr_init) ** min(1.0, progress)

    def largest_lr(self, steps: int, total: int) -> float:
        """The largest learning rate of the first `steps` of `total`: where the warm-up ends, or that of the last."""
        last = steps - 1
        return self.lr_init * max(self.lr_factor(step, total) for step in (min(self.warmup_steps, last), last))


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How an answer is searched for."""

    beam: int = flag(1, "beams, also in validation; 1 is greedy", type=positive, resume_ignored=True)
    temperature: float = flag(
        0.0, "draw tokens from logits divided by this; 0: take the likeliest", resume_ignored=True
    )
    top_p: float = flag(
        1.0,
        "with a temperature: draw from the likeliest tokens that have this probability together",
        resume_ignored=True,
    )
    sampling_seed: int = flag(0, "with a temperature: seed of the draws", type=count, resume_ignored=True)
    max_new_tokens: int | None = flag(
        None,
        "longest answer in tokens (default: the mission's; of transcripts 50 per second of audio, at least 100)",
        type=positive,
        resume_ignored=True,
    )
    loop_guard: bool = flag(False, "cut a transcript that has begun to repeat itself", resume_ignored=True)
    n_best: int = 1
    """Answers to return for each sample, the best one and its alternatives; at most `beam`."""
    length_penalty: float = 1.0
    """Exponent of the length in the ranking of beams: 0 ranks by probability, which favours short answers, 1 by the
    average per token."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p} is a probability: expected more than 0, at most 1")
        if self.temperature and self.beam > 1:
            raise UserError(
                f"--temperature {self.temperature} draws at random, --beam {self.beam} searches: leave one out"
            )
        if self.top_p < 1 and not self.temperature:
            raise UserError(f"--top_p {self.top_p} goes with a --temperature above 0")
        if not 1 <= self.n_best <= self.beam:
            raise ValueError(f"decoding: expected 1 <= n_best <= beam, not n_best = {self.n_best}, beam = {self.beam}")
        if self.length_penalty < 0:
            raise ValueError(f"decoding: length_penalty must be at least 0, not {self.length_penalty}")


@dataclass(frozen=True, kw_only=True)
class LiveOptions:
    """How audio is read while it comes in; times in seconds."""

    step_s: float = flag(0.32, "live: audio that is read at a time; new text comes that often", op="live", type=seconds)
    right_s: float = flag(
        0.32,
        "live: audio after it that the encoder hears with it: what it costs in delay, it gains in words",
        op="live",
        type=seconds_or_0,
    )
    left_s: float | None = flag(
        None,
        "live: audio before it that the encoder hears with it (default: 1, or 3 where its window has one length)",
        op="live",
        type=seconds_or_0,
    )
    pause_s: float = flag(0.5, "live: silence that ends a segment and makes its text final", op="live", type=seconds)
    realtime: bool = flag(False, "live: a file no faster than it was spoken", op="live")


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """What to compute on."""

    precision: str | None = flag(
        None,
        "of computation; trained weights are always fp32 (default: bf16 on a GPU, fp32 on a CPU)",
        choices=("fp32", "tf32", "fp16", "bf16"),
    )
    accelerator: str = flag("auto", "where to compute", choices=("auto", "gpu", "cpu"))
    devices: int | list[int] | None = flag(
        None,
        "GPUs or CPU processes: a number, or indices like 0,1 (default: up to 4 GPUs, or 1 process)",
        type=device_list,
    )
    num_nodes: int = flag(1, "machines", type=positive)
    strategy: str | None = flag(
        None, "Lightning's name for how devices share the work (default: deepspeed_stage_1 on several GPUs, else auto)"
    )

    def __post_init__(self) -> None:
        if self.accelerator == "cpu" and isinstance(self.devices, list):
            raise UserError(
                f"--devices {self.devices} names GPUs, but --accelerator is cpu: give a number of processes"
            )


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """Who may ask the server, and for how much."""

    missions: str | None = flag(
        None,
        "serve: mission files of different missions joined by +; a request names one by its mission or its file "
        "(default: as --adapter)",
        op="serve",
    )
    host: str = flag("127.0.0.1", "serve: address to listen at; 0.0.0.0: all of this machine", op="serve")
    port: int = flag(8000, "serve: where to listen; 0: any that is free", op="serve", type=count)
    api_key: str | None = flag(None, "serve: what requests must show as their bearer token (default: none)", op="serve")
    max_body_mb: float = flag(25.0, "serve: largest request, in MB", op="serve", type=seconds)
    max_request_s: float = flag(600.0, "serve: longest audio of a request, in seconds", op="serve", type=seconds)
    max_queue: int = flag(64, "serve: requests at a time; more are told to come back", op="serve", type=positive)
    max_sessions: int = flag(8, "serve: live sessions at a time", op="serve", type=positive)
    max_batch: int = flag(32, "serve: answers that are decoded together", op="serve", type=positive)
    request_timeout: float = flag(300.0, "serve: seconds that a request may take", op="serve", type=seconds)
    speak: bool = flag(
        False, "serve: the page speaks the answers of conversations, in English, by the package hibari-tts", op="serve"
    )

    def __post_init__(self) -> None:
        if self.port > 65535:
            raise UserError(f"--port {self.port}: expected 0 to 65535")
        if self.api_key is not None and not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", self.api_key, re.ASCII):
            raise UserError(
                "--api_key: expected letters, digits and !#$%&'*+-.^_`|~, which browsers can send to a websocket: "
                "openssl rand -hex 32 makes such a key"
            )


GROUPS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "training": TrainingOptions,
    "decoding": DecodingOptions,
    "live": LiveOptions,
    "machine": MachineOptions,
    "serving": ServingOptions,
}
