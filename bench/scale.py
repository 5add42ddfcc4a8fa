"""What training on LibriSpeech's 960 hours would take on 1 to 64 GPUs: hours, memory, disk, and what bounds it.

A reckoning, not a measurement. Every assumption is a flag and is printed with where it comes from; none of them was
measured on a GPU (docs/gpu.md). What can be counted is counted: a step of the program itself on the meta device,
by torch's own counter, gives the operations of its matrix products and how many calls are launched; memory is what
`engine.overview` says before each run; decoding audio and reading cached frames are timed here, on this CPU.

    step     = the longest of
                 the GPU: products / (peak x reached) or weights / bandwidth, norms and the like, the operator; exchange
                 the host's launches of all that
                 the host's cores, for the step's audio or cached frames; the storage, for those of all GPUs
    exchange = a ring over all GPUs, after the backward pass, for what is trained alone
    hours    = steps to a pass x step / (1 - padding)

Utterances all have the mean length. The batch of each GPU stays the same, so that the global one grows.

python bench/scale.py [--generation 6] [--micro_bsz 4] [--grad_cp 0] [--strategy deepspeed_stage_1]
"""

import argparse
import functools
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.train import CONVOLUTIONS, WIDTH, WORDS, batch_of, random_language_model, random_speech_model
from rwkv_speech import SpeechRWKV
from rwkv_speech.data.batches import Batch
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.sample import Row
from rwkv_speech.engine.deepspeed import STAGES
from rwkv_speech.engine.machine import Machine
from rwkv_speech.engine.overview import estimate_memory
from rwkv_speech.lm import model_class
from rwkv_speech.lm.initialise import official_sizes
from rwkv_speech.lm.weights import ModelSizes
from rwkv_speech.options import Options
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.encoder import import_transformers
from rwkv_speech.speech.frame_cache import AbsentEncoder
from rwkv_speech.speech.recording import Recording
from rwkv_speech.speech.shards import Shards, ShardWriter

TINY = Path(__file__).parents[1] / "demo" / "tiny"
GPUS = (1, 2, 4, 8, 16, 32, 64)
MOST_GPUS = 20_000  # among which a bound is looked for
INPUT = ("host's cores", "storage")
WAVLM_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SIZES = {"3B": (32, 2560), "7B": (32, 4096)}  # layers, width
# Of the operator with 40 heads of 64, 4 x 256 positions, at 70 % of the slots: forward, both ways.
OPERATOR = {6: (60e-6, 232e-6), 7: (106e-6, 486e-6)}
OPERATOR_SIZE = 4 * 256 * 40
HERE = "timed here, on this CPU, one core"
# Flag, value, unit, where it comes from. None: timed.
ASSUMPTIONS = (
    ("peak", 989e12, "FLOP/s, dense bf16", "NVIDIA's data sheet of the H100 SXM"),
    ("bandwidth", 3.35e12, "bytes/s of its memory", "the same"),
    ("memory", 80e9, "bytes of it", "the same"),
    ("nvlink", 450e9, "bytes/s each way within a node", "the same: 900 GB/s both ways together"),
    ("node", 8, "GPUs to a node", "NVIDIA's data sheet of the DGX H100"),
    ("network", 50e9, "bytes/s each way between nodes, for each GPU", "the same: 400 Gb/s to a GPU"),
    ("cores", 14, "CPU cores for each GPU", "the same: 112 cores to 8 GPUs"),
    ("hop", 10e-6, "s, latency of one step of a ring", "assumed"),
    ("storage", 5e9, "bytes/s that all GPUs share", "assumed"),
    ("launch", 5e-6, "s of the host for each call", "assumed; CUDA graphs and compiled blocks would make it less"),
    ("reached", 0.607, "of the peak, by large products", "assumed, as in docs/wkv-cuda.md: 600 TFLOP/s"),
    ("products", 0.826, "of a step's time is its products at what they reach", "bench/train.py, measured on a CPU"),
    ("operator", 0.025, "of it is the operator, which is reckoned apart here", "bench/train.py, measured on a CPU"),
    ("padding", 0.04, "of a batch", "the most that data/buckets.py allows, but for speeds that are drawn"),
    ("hours", 960.9, "h of audio", "LibriSpeech, Panayotov et al. 2015"),
    ("utterances", 281_241, "utterances", "LibriSpeech's three training splits"),
    ("words", 9.4e6, "words", "LibriSpeech's training transcripts"),
    ("tokens", 1.3, "tokens to a word", "assumed"),
    ("flac", 60e9, "bytes of FLAC", "README"),
    ("decoding", None, "CPU s for each s of FLAC: reading, decoding, normalising, collating", HERE),
    ("reading", None, "CPU s for each s of cached frames: reading, checking their sum, collating", HERE),
)


@dataclass(frozen=True)
class Work:
    """Of a step on one GPU: FLOPs of matrix products, calls that are launched, bytes of weights that are read."""

    flops: float
    calls: int
    weights: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.calls + other.calls, self.weights + other.weights)


class _Calls(TorchDispatchMode):
    """Counts what is called, without what only looks at a tensor otherwise."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (function.is_view or function is torch.ops.aten._unsafe_view.default)
        return function(*args, **(kwargs or {}))


def count(thing: Callable[[], object]) -> Work:
    with _Calls() as calls, FlopCounterMode(display=False) as flops:
        thing()
    return Work(flops.get_total_flops(), calls.count)


@functools.cache
def encoding(utterances: int, samples: int) -> Work:
    """Of one call of WavLM-large in bf16."""
    transformers = import_transformers()
    config = transformers.WavLMConfig(feat_extract_norm="layer", do_stable_layer_norm=True, **WAVLM_LARGE)
    with torch.device("meta"):
        network = transformers.WavLMModel(config).eval().requires_grad_(False)
        waveforms = torch.empty(utterances, samples, dtype=torch.bfloat16)
    network.to("meta", torch.bfloat16)  # one of its tensors is made elsewhere
    work = count(torch.no_grad()(lambda: network(waveforms)))
    return replace(work, weights=_bytes(network))


class Run:
    """Training of one model, on the meta device.

    a: the assumptions and flags.
    sizes: of the language model.
    """

    def __init__(self, a: argparse.Namespace, sizes: ModelSizes) -> None:
        self.a = a
        self.seconds = 3600 * a.hours / a.utterances
        with torch.device("meta"):
            language_model = model_class(sizes.generation)(sizes).to(torch.bfloat16)
            adapter = Adapter(WIDTH, sizes.n_embd)
        for state in language_model.time_states:
            state.data = state.data.float()
        encoder = AbsentEncoder("WavLM-large", width=WIDTH, convolutions=CONVOLUTIONS)
        self.model = SpeechRWKV(language_model, encoder, adapter)
        language_model.checkpointing = bool(a.grad_cp)
        self.trained = sum(x.numel() for x in self.model.trainable_state_dict().values())
        self.weights = _bytes(language_model)
        self.batch = self._batch()
        step = count(lambda: self.model.loss_sum(self.batch).backward())
        self.step = replace(step, weights=self.weights * (3 if a.grad_cp else 2))
        self.encode = encoding(a.micro_bsz, round(self.seconds * SAMPLE_RATE))

    def memory(self, gpus: int, *, cached: bool) -> float:
        """Bytes on each GPU."""
        a = self.a
        flags = [f"--micro_bsz={a.micro_bsz}", f"--grad_cp={a.grad_cp}"]
        nodes = math.ceil(gpus / a.node)
        machine = Machine("gpu", math.ceil(gpus / nodes), nodes, a.strategy if gpus > 1 else "auto", "bf16")
        found = estimate_memory(self.model, Options.parse(["--op=train", "--load_model=-", *flags]), machine)
        return sum(found.values()) + (0 if cached else self.encode.weights)

    def _batch(self) -> Batch:
        """Utterances of the mean length and number of words, with cached frames."""
        words = self.a.words / self.a.utterances * self.a.tokens  # each of WORDS is one token
        frames = torch.empty(self.model.speech_encoder.frame_count(round(self.seconds * SAMPLE_RATE)), WIDTH)
        text = " ".join(WORDS[i % len(WORDS)] for i in range(round(words)))
        batch = batch_of(self.model, [frames] * self.a.micro_bsz, [text] * self.a.micro_bsz)
        return batch.to("meta")

    def gpu_seconds(self, work: Work, operator: float = 0.0) -> float:
        """operator: seconds of the WKV operators."""
        a = self.a
        products = max(self.arithmetic(work), work.weights / a.bandwidth)
        rest = products * (1 - a.products - a.operator) / a.products
        return products + rest + operator

    def arithmetic(self, work: Work) -> float:
        """Seconds of the matrix products."""
        return work.flops / (self.a.peak * self.a.reached)

    def operator_seconds(self) -> float:
        sizes = self.model.language_model.sizes
        forward, both = OPERATOR[sizes.generation]
        per = (both + forward * self.a.grad_cp) / OPERATOR_SIZE
        return per * self.batch.ids.numel() * sizes.n_head * sizes.n_layer * (sizes.head_size / 64)

    def exchange_seconds(self, gpus: int) -> float:
        """A ring: gradients are summed, and what was updated is gathered; stage 3 gathers before each pass, too."""
        a = self.a
        rounds = 3 if a.strategy.startswith("deepspeed_stage_3") else 2  # Rajbhandari et al. 2020, ZeRO, section 7
        speed = a.nvlink if gpus <= a.node else min(a.nvlink, a.node * a.network)  # rings share the node's adapters
        return rounds * (gpus - 1) * (4 * self.trained / gpus / speed + a.hop)

    def parts(self, gpus: int, *, cached: bool) -> dict[str, float]:
        """Seconds of a step by what they are spent on, one beside the other."""
        a, audio = self.a, self.a.micro_bsz * self.seconds
        work = self.step if cached else self.step + self.encode
        gpu, exchange = self.gpu_seconds(work, self.operator_seconds()), self.exchange_seconds(gpus)
        stored = cached_bytes(audio) if cached else a.flac / (3600 * a.hours) * audio
        name = "products" if self.arithmetic(work) >= work.weights / a.bandwidth else "weights"
        return {
            name if gpu >= exchange else "exchange": gpu + exchange,
            "launches": work.calls * a.launch + exchange,
            "host's cores": audio * (a.reading if cached else a.decoding) / a.cores,
            "storage": gpus * stored / a.storage,
        }

    def steps(self, gpus: int) -> int:
        return math.ceil(self.a.utterances / (self.a.micro_bsz * gpus))

    def hours(self, gpus: int, *, cached: bool) -> tuple[float, str]:
        """Of a pass, and what bounds it."""
        parts = self.parts(gpus, cached=cached)
        bound = max(parts, key=parts.__getitem__)
        return self.steps(gpus) * parts[bound] / (1 - self.a.padding) / 3600, bound

    def filling_hours(self, gpus: int) -> float:
        """Of computing the frames to be cached: the encoder, or decoding for it, or writing."""
        a, audio = self.a, self.a.micro_bsz * self.seconds
        gpu = max(self.gpu_seconds(self.encode), self.encode.calls * a.launch, audio * a.decoding / a.cores)
        return self.steps(gpus) * max(gpu, gpus * cached_bytes(audio) / a.storage) / (1 - a.padding) / 3600


def first(reached: Callable[[int], bool]) -> str:
    """The smallest number of GPUs at which something is reached."""
    found = next((n for n in range(1, MOST_GPUS) if reached(n)), None)
    return f"more than {MOST_GPUS:,}" if found is None else f"{found:,}"


def _bytes(module: nn.Module) -> int:
    """Of frozen weights."""
    return sum(x.nbytes for x in module.parameters() if not x.requires_grad)


def cached_bytes(seconds: float) -> float:
    """Of fp16 frames."""
    return seconds * SAMPLE_RATE / math.prod(stride for _, stride in CONVOLUTIONS) * 2 * WIDTH


def table(run: Run, name: str) -> list[str]:
    a, sizes = run.a, run.model.language_model.sizes
    milliseconds = {
        "products and what goes with them": run.gpu_seconds(run.step),
        "operator": run.operator_seconds(),
        "encoder": run.gpu_seconds(run.encode),
        "launches": run.step.calls * a.launch,
        "encoder's launches": run.encode.calls * a.launch,
        "exchange among 8": run.exchange_seconds(8),
        "among 64": run.exchange_seconds(64),
    }
    disk = {
        "language model": run.weights,
        "encoder": 2 * run.encode.weights,  # its file is fp32
        "FLAC": a.flac,
        "cached frames": cached_bytes(3600 * a.hours),
        "mission file": 4 * run.trained,
        "resume point": 12 * run.trained,
    }
    lines = [
        f"RWKV-{sizes.generation} {name}, {sizes.n_layer} x {sizes.n_embd}: {run.weights / 2e9:.2f} G weights, "
        f"{run.trained / 1e6:.1f} M trained, {a.strategy}, grad_cp={a.grad_cp}",
        f"a step, {a.micro_bsz} utterances of {run.seconds:.1f} s to a GPU: {run.step.flops / 1e12:.2f} TFLOP in "
        f"{run.step.calls:,} calls, and the encoder's {run.encode.flops / 1e12:.2f} in {run.encode.calls:,}",
        f"  ms: {', '.join(f'{what} {1e3 * x:.1f}' for what, x in milliseconds.items())}",
        f"disk, GB: {', '.join(f'{what} {x / 1e9:.3g}' for what, x in disk.items())}",
        "",
        "              from FLAC                           from cached frames                  filling",
        "GPUs   steps  h of a pass, bound by     GB each   h of a pass, bound by     GB each   the cache, h",
    ]
    for gpus in GPUS:
        cells = [f"{gpus:4}  {run.steps(gpus):6}"]
        for cached in (False, True):
            hours, bound = run.hours(gpus, cached=cached)
            memory = run.memory(gpus, cached=cached)
            cells.append(f"{hours:6.3f}  {bound:16} {memory / 1e9:5.1f}" + ("!" if memory > a.memory else " "))
        lines.append("   ".join([*cells, f"{run.filling_hours(gpus):6.3f}"]))
    for cached, what in ((False, "FLAC"), (True, "cached frames")):
        alone = max(run.parts(1, cached=cached).values())
        bounded = first(lambda n: run.hours(n, cached=cached)[1] in INPUT)  # noqa: B023
        tenth, whole = (first(lambda n: run.exchange_seconds(n) > share * alone) for share in (0.1, 1))  # noqa: B023
        lines.append(
            f"from {what}: bound by the input from {bounded} GPUs; the exchange takes a tenth of what a step takes "
            f"without it from {tenth}, as long as that from {whole}"
        )
    return lines


@torch.no_grad()
def timed_input() -> dict[str, float]:
    """CPU seconds for each second of audio: from FLAC to a batch, from cached frames to a batch."""
    rows = read_manifest(TINY / "corpus" / "test.jsonl")
    speech = torch.cat([row.audio.waveform() for row in rows[:20]])[: 12 * SAMPLE_RATE]
    text = " ".join(WORDS[i % len(WORDS)] for i in range(33))
    model = SpeechRWKV.from_pretrained(TINY / "rwkv6-tiny.pth", encoder=str(TINY / "wavlm-tiny"))
    wide = random_speech_model(random_language_model(n_layer=1, n_embd=64))
    with tempfile.TemporaryDirectory() as name:
        path, shards = Path(name) / "speech.flac", Shards(Path(name), width=WIDTH, storage="fp16")
        soundfile.write(path, speech.numpy(), SAMPLE_RATE)
        frames = torch.randn(wide.speech_encoder.frame_count(len(speech)), WIDTH)
        with ShardWriter(shards) as writer:
            record = writer.add(b"0" * 16, frames, len(speech))
            writer.commit()
        shards.reload()
        samples = [model.sample(Row(str(i), text, Recording(path))) for i in range(4)]
        decoding = _cpu_seconds(lambda: model.prepare(samples))
        reading = _cpu_seconds(lambda: batch_of(wide, [shards.read(record) for _ in samples], [text] * len(samples)))
    seconds = len(samples) * len(speech) / SAMPLE_RATE
    return {"decoding": decoding / seconds, "reading": reading / seconds}


def _cpu_seconds(thing: Callable[[], object]) -> float:
    """The least of several runs."""
    times = []
    for _ in range(8):
        start = time.process_time()
        thing()
        times.append(time.process_time() - start)
    return min(times)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generation", type=int, choices=(6, 7), default=6)
    parser.add_argument("--micro_bsz", type=int, default=4)
    parser.add_argument("--grad_cp", type=int, choices=(0, 1), default=0)
    parser.add_argument("--strategy", choices=("ddp", *STAGES), default="deepspeed_stage_1")
    for name, value, unit, source in ASSUMPTIONS:
        parser.add_argument(f"--{name}", type=type(value or 0.0), default=value, help=f"{unit} ({source})")
    return parser.parse_args(arguments)


def main() -> None:
    a = parse()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    to_time = [name for name in ("decoding", "reading") if getattr(a, name) is None]
    if to_time:
        vars(a).update({name: seconds for name, seconds in timed_input().items() if name in to_time})
    print("A reckoning; nothing of it was measured on a GPU. Assumed:\n")
    for name, default, unit, source in ASSUMPTIONS:
        value = getattr(a, name)
        print(f"  --{name:10} {value:<12.6g} {unit}: {source if value == default or name in to_time else 'as given'}")
    forward, both = OPERATOR[a.generation]
    print(
        f"  operator: {1e6 * forward:.0f} us forward, {1e6 * both:.0f} us both ways for 40 heads, 4 x 256 positions: "
        "docs/wkv-cuda.md, reckoned\n"
        "  nothing of the exchange is hidden behind the backward pass; the loader's workers hide all of theirs\n"
        "  memory is without the encoder's activations, and for samples of 15 s"
    )
    for name, (n_layer, n_embd) in SIZES.items():
        run = Run(a, official_sizes(generation=a.generation, n_layer=n_layer, n_embd=n_embd))
        print("", *table(run, name), sep="\n")


if __name__ == "__main__":
    main()
