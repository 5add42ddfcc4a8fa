"""What `growth.py` measures: costs against length, batch, utterances and missions, with the growth that is expected."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.train import WORDS
from bench.wkv import train as operator_both_ways
from rwkv_speech import SpeechRWKV
from rwkv_speech.alignment import alignment_loss_sum
from rwkv_speech.data.buckets import BoundedBatches, ByLength, padding_waste
from rwkv_speech.data.durations import read_durations
from rwkv_speech.data.loading import SharedBatches, Shuffled
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.sample import Row, fingerprint
from rwkv_speech.lm.state import State
from rwkv_speech.lm.wkv import wkv6, wkv7
from rwkv_speech.missions.task import Task
from rwkv_speech.ops.common import check_missions
from rwkv_speech.options import DecodingOptions
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.recording import Recording
from rwkv_speech.speech.segments import cut

TINY = Path(__file__).parents[1] / "demo" / "tiny"
SECONDS = (1, 4, 15, 60, 240, 900, 3600)
ONE_SAMPLE = SECONDS[:-1]  # of training
ONE_CALL = (1, 2, 4, 8, 15, 30, 60)  # of the encoder, which is never longer than the longest segment
RECORDINGS = (15, 60, 120, 240, 900, 3600)  # what is longer than a batch of segments, and the blocks that are read
BATCHES = MISSIONS = (1, 4, 16, 64)
ROWS = (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
PIECE = 150  # positions that are read in one go, 15 s

Thing = Callable[[], object]
Prepare = Callable[[int], Thing]


@dataclass(frozen=True)
class Cost:
    """Something that takes time and memory.

    against: what `sizes` count.
    prepare: of a size, what is then measured.
    expected: the exponents of time and memory that are, and
    why: the reason.
    above: where one is known to be higher, what makes it so.
    """

    what: str
    against: str
    sizes: tuple[int, ...]
    prepare: Prepare
    expected: tuple[float, float]
    why: str
    above: str = ""


class Parts:
    """The quick-start's frozen parts, and speech of any length.

    folder: where a recording of an hour, manifests and the like are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parts = {"encoder": str(TINY / "wavlm-tiny"), "adapter_hidden": 256, "dtype": torch.float32}
        self.model = SpeechRWKV.from_pretrained(TINY / "rwkv6-tiny.pth", **parts)
        self.encoder, self.lm = self.model.speech_encoder, self.model.language_model
        rows = read_manifest(TINY / "corpus" / "test.jsonl")
        self.spoken = torch.cat([row.audio.waveform() for row in rows[:40]])
        self.recording = folder / "speech.wav"
        with soundfile.SoundFile(self.recording, "w", SAMPLE_RATE, 1) as file:
            while file.frames < SECONDS[-1] * SAMPLE_RATE:
                file.write(self.spoken.numpy())

    def costs(self) -> Iterator[Cost]:
        for costs in (by_length, by_batch, by_rows, by_missions):
            yield from costs(self)

    def speech(self, seconds: int) -> Tensor:
        samples = seconds * SAMPLE_RATE
        return self.spoken.repeat(-(-samples // len(self.spoken)))[:samples]

    def recorded(self, seconds: int) -> Recording:
        return Recording(self.recording, duration=float(seconds), offset=0.0)

    def positions(self, seconds: int, batch: int = 1) -> Tensor:
        """What the adapter could have made of so much audio: (batch, T, n_embd)."""
        frames = self.encoder.frame_count(seconds * SAMPLE_RATE)
        return torch.randn(batch, self.model.adapter.group_count(frames), self.lm.sizes.n_embd)

    @torch.inference_mode()
    def read(self, x: Tensor, piece: int | None = None, which: Tensor | None = None) -> State:
        """The state after positions x (B, T, C), read in one go or piece by piece."""
        state = None
        for part in x.split(piece or x.shape[1], dim=1):
            _, state = self.lm(part, state, which=which)
        return state

    def ten_tokens(self, state: State, rows: int = 1) -> Thing:
        """Ten times the step of decoding that follows a state."""
        token = torch.full((rows, 1), 36)

        @torch.inference_mode()
        def thing() -> None:
            for _ in range(10):
                self.lm.logits(self.lm(token, state)[0])

        return thing

    def training_step(self, seconds: int, missions: Sequence[str | None], model: SpeechRWKV | None = None) -> Thing:
        """Loss and gradients of samples of speech with cached frames and 1.5 words a second, one for each mission."""
        model = model or self.model
        text = " ".join(WORDS[i % len(WORDS)] for i in range(math.ceil(1.5 * seconds)))
        rows = (Row(str(i), text, self.speech(seconds), mission=name) for i, name in enumerate(missions))
        batch = model.prepare([model.sample(row) for row in rows])
        sizes = batch.frame_lengths.tolist()
        frames = torch.randn(sum(sizes), self.encoder.width)
        batch = replace(batch, audio=frames, audio_sizes=sizes, is_frames=True)

        def thing() -> None:
            model.loss_sum(batch).backward()
            model.zero_grad()

        return thing


def by_length(parts: Parts) -> Iterator[Cost]:
    encoder, adapter, lm = parts.encoder, parts.model.adapter, parts.lm

    def encode(seconds: int) -> Thing:
        x = encoder.extract(parts.speech(seconds))
        return lambda: encoder.encode([x], [seconds * SAMPLE_RATE])

    def adapt(seconds: int) -> Thing:
        frames = torch.randn(1, encoder.frame_count(seconds * SAMPLE_RATE), encoder.width)
        return torch.no_grad()(lambda: adapter(frames, torch.tensor([frames.shape[1]])))

    def inputs(seconds: int) -> tuple[Tensor, ...]:
        """Five of (1, T, H, N), as wide as the model."""
        H, N = lm.sizes.n_head, lm.sizes.head_size
        return torch.randn(5, *parts.positions(seconds).view(1, -1, H, N).shape).unbind()

    def operate6(seconds: int) -> Thing:
        r, k, v, w, gy = inputs(seconds)
        leaves = [x.requires_grad_() for x in (r, k, v, w, torch.randn(r.shape[2:]), torch.randn(*r.shape[2:], 64))]
        return lambda: operator_both_ways(wkv6, leaves, gy)

    def operate7(seconds: int) -> Thing:
        r, k, v, w, a = inputs(seconds)
        a = torch.nn.functional.normalize(a, dim=-1)
        leaves = [x.requires_grad_() for x in (r, w, k, v, -a, a / 2, torch.randn(*r.shape[2:], 64))]
        return lambda: operator_both_ways(wkv7, leaves, v.detach())

    def read(seconds: int) -> Thing:
        x = parts.positions(seconds)
        return lambda: parts.read(x)

    def read_in_pieces(seconds: int) -> Thing:
        x = parts.positions(seconds)
        return lambda: parts.read(x, PIECE)

    def token(seconds: int) -> Thing:
        return parts.ten_tokens(parts.read(parts.positions(seconds)))

    def step(seconds: int) -> Thing:
        return parts.training_step(seconds, [None])

    def align(seconds: int) -> Thing:
        x = parts.positions(seconds).requires_grad_()
        tokens, lengths = torch.randint(2, lm.sizes.vocab_size, (7 * seconds,)), torch.tensor([x.shape[1]])
        return lambda: alignment_loss_sum(x, lengths, [tokens], lm.emb.weight).backward()

    def find_pauses(seconds: int) -> Thing:
        return lambda: sum(1 for _ in cut(parts.recorded(seconds).blocks(), max_seconds=5))

    def transcribe(seconds: int) -> Thing:
        how = {"batch_size": 4, "max_audio_s": 5, "options": DecodingOptions(max_new_tokens=8)}
        return lambda: sum(1 for _ in parts.model.transcripts([parts.recorded(seconds)], **how))

    every = "each position is as much work as another"
    filling = "Buffers fill in the first minutes; an hour takes hardly more than a quarter of one"
    for what, sizes, prepare, expected, why in (
        ("encoder, one call", ONE_CALL, encode, (2, 2), "attention compares each frame with each"),
        ("adapter", SECONDS, adapt, (1, 1), every),
        ("WKV operator of RWKV-6, both ways", SECONDS, operate6, (1, 1), every),
        ("WKV operator of RWKV-7, both ways", SECONDS, operate7, (1, 1), every),
        ("language model reads, in one go", SECONDS, read, (1, 1), every),
        ("the same in pieces of 15 s", SECONDS, read_in_pieces, (1, 0), "what goes from piece to piece is the state"),
        ("ten tokens after so much audio", SECONDS, token, (0, 0), "the state has one size"),
        ("training step on cached frames", ONE_SAMPLE, step, (1, 1), every),
        ("CTC alignment", ONE_SAMPLE, align, (2, 2), "each position with each token of the transcript"),
        ("voice activity and cutting of a file", RECORDINGS, find_pauses, (1, 0), "block by block"),
        (
            "prediction of a file",
            RECORDINGS,
            transcribe,
            (1, 0),
            "cut at 5 s; 4 segments are in memory, and 9 ahead",
        ),
    ):
        yield Cost(what, "seconds of audio", sizes, prepare, expected, why, filling if sizes is RECORDINGS else "")


def by_batch(parts: Parts) -> Iterator[Cost]:
    def encode(batch: int) -> Thing:
        x = [parts.encoder.extract(parts.speech(2))] * batch
        return lambda: parts.encoder.encode(x, [2 * SAMPLE_RATE] * batch)

    def read(batch: int) -> Thing:
        x = parts.positions(2, batch)
        return lambda: parts.read(x)

    def tokens(batch: int) -> Thing:
        return parts.ten_tokens(parts.read(parts.positions(1, batch)), batch)

    def step(batch: int) -> Thing:
        return parts.training_step(2, [None] * batch)

    why = "rows are independent; below 1 where few of them leave something idle"
    for what, prepare in (
        ("encoder, 2 s each", encode),
        ("language model reads, 2 s each", read),
        ("ten tokens for each", tokens),
        ("training step on cached frames, 2 s each", step),
    ):
        yield Cost(what, "samples in a batch", BATCHES, prepare, (1, 1), why)


class Stamped:
    """Encoded audio that is known by its stamp alone."""

    def __init__(self, number: int) -> None:
        self.number = number

    def stamp(self, *, strict: bool = True) -> str:
        return f"/data/corpus/{self.number:07}.flac 1700000000000000000 123456"


def by_rows(parts: Parts) -> Iterator[Cost]:
    def seconds_of(number: int) -> float:
        return 1.0 + number * 7 % 1500 / 100

    def file(name: str, count: int, lines: Iterator[str]) -> Path:
        path = parts.folder / f"{os.getpid()}-{count}{name}"
        path.write_text("".join(lines))
        return path

    def manifest(count: int) -> Path:
        row = {"audio": str(parts.recording), "text": " ".join(WORDS * 2)}
        rows = (row | {"id": f"u{i}", "duration": seconds_of(i)} for i in range(count))
        return file(".jsonl", count, (json.dumps(row) + "\n" for row in rows))

    def read(count: int) -> Thing:
        path = manifest(count)
        return lambda: read_manifest(path)

    def check(count: int) -> Thing:
        rows = read_manifest(manifest(count))

        def thing() -> None:
            check_missions(rows, parts.model)
            fingerprint(rows, parts.model.sample)

        return thing

    def lengths(count: int) -> Thing:
        rows = [Row(str(i), "", Recording(Stamped(i))) for i in range(count)]
        known = {row.audio.stamp(): seconds_of(i) for i, row in enumerate(rows)}
        path = file(".json", count, iter([json.dumps(known)]))
        return lambda: read_durations(rows, path)

    def plan(count: int) -> Thing:
        seconds = np.array([seconds_of(i) for i in range(count)])

        def thing() -> None:
            by_length = ByLength(lambda epoch: seconds, count, step=32, seed=0)
            bounded = BoundedBatches(Shuffled(count, seed=0), lambda epoch: seconds, 60.0, longest=seconds)
            padding_waste(SharedBatches(by_length, 8, even=True), seconds)
            padding_waste(bounded, seconds)

        return thing

    for what, prepare, why in (
        ("reading a manifest", read, "line by line"),
        ("checking rows, fingerprint of the data", check, "row by row, with the stamp of its file"),
        ("lengths from the cache", lengths, "one JSON file, a look-up for each row"),
        ("plan of an epoch, by count and by seconds", plan, "sorting; its logarithm is too little to be seen"),
    ):
        little = "80 bytes a row, less than 1 MiB up to 30,000 of them" if prepare is check else ""
        yield Cost(what, "utterances", ROWS, prepare, (1, 1), why, little)


def by_missions(parts: Parts) -> Iterator[Cost]:
    rows = MISSIONS[-1]

    def model_of(missions: int, adapters: int = 1) -> SpeechRWKV:
        made = (Adapter(parts.encoder.width, parts.lm.sizes.n_embd, hidden=256) for _ in range(adapters))
        tasks = [Task("transcribe"), *(Task(f"transcribe/{i}") for i in range(1, missions))]
        return SpeechRWKV(parts.lm, parts.encoder, *made, tasks=tasks)

    def step_of(model: SpeechRWKV) -> Thing:
        names = [*model.tasks]
        return parts.training_step(1, [names[i % len(names)] for i in range(rows)], model)

    def shared(missions: int) -> Thing:
        return step_of(model_of(missions))

    def own(missions: int) -> Thing:
        return step_of(model_of(missions, missions))

    def tokens(missions: int) -> Thing:
        model_of(missions)  # which gives the language model as many initial states
        which = torch.arange(rows) % missions if missions > 1 else None
        return parts.ten_tokens(parts.read(parts.positions(1, rows), which=which), rows)

    states = "64 rows, whatever their missions"
    adapters = "64 rows, by one adapter or another; gradients come when the model's activations are gone"
    for what, prepare, why in (
        ("training step of 64 samples, one adapter", shared, states),
        ("the same, an adapter for each mission", own, adapters),
        ("ten tokens for 64 rows", tokens, states),
    ):
        yield Cost(what, "missions", MISSIONS, prepare, (0, 0), why)
