"""The sizes that are used: a training step and decoding of 3B models of random weights, and what may speed them up."""

import json
import re
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.common import (
    GENERATIONS,
    Limits,
    Run,
    compile_blocks,
    interleaved,
    medians,
    profile,
    random_language_model,
    relative_error,
)
from rwkv_speech.lm.language_model import LanguageModel
from rwkv_speech.lm.state import State

WORDS = ["they", "came", "to", "the", "river", "in", "evening", "and", "found", "nobody", "there", "who", "knew"]
TOKENS = 60  # of 15 s of audio
ANSWER = {"max_new_tokens": TOKENS}  # what transcribe() takes to end there
COMPILED = 5e-2  # a relative difference of bf16 logits that a change of their order of rounding explains


def train(run: Run) -> None:
    """Training steps of 3B beside WavLM-large's form; of RWKV-7 time and memory alone."""
    from rwkv_speech import SpeechRWKV

    model = from_files(run)
    encoder, adapter = model.speech_encoder, model.adapter
    study(run, model)
    if run.warm:
        return
    del model  # room for the other one

    def other_generation() -> None:
        model = SpeechRWKV(random_language_model(run, 7), encoder, adapter)
        Training(run, model, 4).time_and_memory()

    run.section("RWKV-7", other_generation)


def quantised(run: Run) -> None:
    """A packed language model: a step's time and memory, and an answer's time."""
    for quant in ("int8", "nf4"):

        def one() -> None:
            model = from_files(run, quant)  # noqa: B023
            training = Training(run, model, 4, f"RWKV-6 in {quant}")  # noqa: B023
            training.time_and_memory()
            real_time_factor(run, model, training.waveforms[0])

        run.section(quant, one)


def utterances(run: Run, count: int) -> tuple[list[Tensor], list[str]]:
    """15 s of speech each, since silence would not be decoded, and 45 words, which have nothing to do with it."""
    corpus = run.program / "demo" / "tiny" / "corpus"
    lines = [json.loads(line) for line in (corpus / "test.jsonl").read_text().splitlines()]
    speech = np.concatenate([soundfile.read(corpus / line["audio"], dtype="float32")[0] for line in lines[:20]])
    samples = run.size(15, 1) * 16000
    waveforms = [torch.from_numpy(np.resize(np.roll(speech, -i * 16000), samples)) for i in range(count)]
    return waveforms, [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(run.size(45, 5))) for i in range(count)]


def from_files(run: Run, quant: str = "none") -> nn.Module:
    """3B of random weights with its encoder, written to files and read."""
    from rwkv_speech import SpeechRWKV

    with TemporaryDirectory(dir=fast_folder(run)) as name:
        folder = Path(name)
        tensors = {name: x.cpu().clone() for name, x in random_language_model(run).state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        write_encoder(run, folder / "encoder")
        del tensors
        begin = time.perf_counter()
        model = SpeechRWKV.from_pretrained(
            folder / "model.safetensors",
            encoder=str(folder / "encoder"),
            device=run.device,
            dtype=torch.bfloat16,
            quant=quant,
        )
        run.wait()
    run.record("3B and encoder read from files", quant=quant, seconds=round(time.perf_counter() - begin, 1))
    return model


def study(run: Run, model: nn.Module) -> None:
    """Time against a step's products, memory, what takes the time; what larger batches and compiled blocks change."""
    training = Training(run, model, 4)
    if run.warm:
        training.compiled()
        return
    training.time_and_memory()
    run.section("profile", lambda: run.record(f"{training.what}, profile", **profile(run, training.step)))
    run.section("transcribe", lambda: real_time_factor(run, model, training.waveforms[0]))
    larger = Training(run, model, 16)
    run.section(larger.what, lambda: larger.time(larger.what))
    run.section("profile", lambda: run.record(f"{larger.what}, profile", **profile(run, larger.step)))
    run.section("compiled blocks", training.compiled)
    run.section("compiled blocks", larger.compiled)


class Training:
    """Training steps on one batch."""

    def __init__(self, run: Run, model: nn.Module, batch: int, name: str | None = None) -> None:
        self.run, self.model = run, model
        self.waveforms, self.texts = utterances(run, run.size(batch, 2))
        self.trained = [*model.trainable_state_dict().values()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.generation = model.language_model.generation
        self.name = name or f"RWKV-{self.generation}"
        size = f"3B, {len(self.waveforms)} x {len(self.waveforms[0]) / 16000:g} s"
        self.what = f"{self.name}, training step, {size}"
        self.step()
        with FlopCounterMode(display=False) as counter:
            model.loss(self.waveforms, self.texts).backward()
        self.flops = counter.get_total_flops()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.model.loss(self.waveforms, self.texts).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time_and_memory(self) -> None:
        self.run.section(self.what, lambda: self.time(self.what))
        for grad_cp in (0, 1):
            self.run.section(f"{self.what}, memory", lambda: self.memory(grad_cp))  # noqa: B023

    def time(self, what: str) -> None:
        run, limits = self.run, Limits(self.run)
        times = interleaved(run, {"step": self.step} | limits.things, rounds=1 if run.warm else run.size(8, 1))
        spent, (peak, _) = medians(times)["step"], limits.of(times)
        found = {"ms": round(spent * 1e3, 1), "tflop": round(self.flops / 1e12, 3)}
        found |= {"peak tflop/s": round(peak / 1e12, 1), "share of peak": round(self.flops / peak / spent, 3)}
        run.record(what, backend=run.backend, **found)

    def compiled(self) -> None:
        """As `--compile` has it; the first batch compiles, the others of the run find it done."""
        run, language_model = self.run, self.model.language_model
        loss = self.model.loss(self.waveforms, self.texts).detach()
        language_model.compile_blocks(backend=run.size("inductor", "aot_eager"))
        begin = time.perf_counter()
        off = relative_error(self.model.loss(self.waveforms, self.texts), loss)
        self.step()
        run.wait()
        seconds = round(time.perf_counter() - begin, 1)
        run.record(f"{self.what}, compiled, agrees", ok=off <= COMPILED, error=off, **{"first step, s": seconds})
        self.time(f"{self.what}, compiled")
        run.record(f"{self.what}, compiled, profile", **profile(run, self.step))
        language_model.compile_blocks(False)

    def memory(self, grad_cp: int) -> None:
        run, language_model = self.run, self.model.language_model
        language_model.checkpointing = bool(grad_cp)
        self.step()
        if not run.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.step()
        peak = 0 if run.dry else torch.cuda.max_memory_allocated()
        language_model.checkpointing = False
        found = {"gb": round(peak / 1e9, 2)}
        if not language_model.quant:
            found["README's table"] = readme_memory(run, self.generation)[grad_cp]
        run.record(f"{self.name}, memory, grad_cp={grad_cp}", **found)


def real_time_factor(run: Run, model: nn.Module, waveform: Tensor) -> None:
    calls = []
    hook = model.language_model.register_forward_hook(lambda *_: calls.append(1))
    model.transcribe([waveform], batch_size=1, **ANSWER)
    calls.clear()
    run.wait()
    begin = time.perf_counter()
    model.transcribe([waveform], batch_size=1, **ANSWER)
    run.wait()
    spent = time.perf_counter() - begin
    hook.remove()
    seconds = len(waveform) / 16000
    found = {"seconds": round(spent, 3), "real-time factor": round(spent / seconds, 4)}
    run.record(f"transcribe, {seconds:g} s of audio", passes=len(calls), **found)


def decode(run: Run) -> None:
    """Tokens a second, plain and with the remedies (of RWKV-7 without compiling), against reading the weights once."""
    for generation in GENERATIONS:
        if generation == 6 or not run.warm:
            decode_generation(run, generation)


def decode_generation(run: Run, generation: int) -> None:
    model = random_language_model(run, generation)
    limits = Limits(run)
    weights = sum(x.nbytes for name, x in model.named_parameters() if name != "emb.weight")
    with torch.inference_mode():
        for batch in run.size((1, 16, 64) if generation == 6 else (1, 16), (1, 2)):
            run.section(f"RWKV-{generation}, batch {batch}", lambda: decode_batch(run, model, limits, batch, weights))  # noqa: B023
        compile_blocks(run, False)
        decoding = Decoding(run, model, 1)
        decoding.steps(2)
        what = f"RWKV-{generation}, profile of 5 tokens"
        run.section(what, lambda: run.record(what, **profile(run, lambda: decoding.steps(5))))


class Decoding:
    """Greedy decoding of a batch, step by step, as the program does it: on a GPU by its graphs."""

    def __init__(self, run: Run, model: LanguageModel, batch: int) -> None:
        self.run, self.model = run, model
        generator = torch.Generator().manual_seed(batch)
        prompt = torch.randint(1, model.sizes.vocab_size, (batch, 4), generator=generator).to(run.device)
        _, self.state = model(prompt)
        self.token, self.first_token = prompt[:, -1:].clone(), prompt[:, -1:].clone()
        self.state = self.state.clone()
        self.first_state = self.state.clone()

    def step(self) -> None:
        hidden, self.state = self.model(self.token, self.state)
        self.choose(hidden)

    def choose(self, hidden: Tensor) -> None:
        self.logits = self.model.logits(hidden[:, -1])
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def restart(self) -> None:
        self.state = self.first_state
        self.token.copy_(self.first_token)

    def steps(self, count: int) -> list[Tensor]:
        tokens = []
        for _ in range(count):
            self.step()
            tokens.append(self.token.clone())
        return tokens


class Plain(Decoding):
    """The same, launched operation by operation."""

    def step(self) -> None:
        hidden, self.state = self.model.run(self.model.embed(self.token), self.state)
        self.choose(hidden)


class Captured(Decoding):
    """A step and the choice of its token as one graph, with all that it reads and writes in the same memory."""

    def __init__(self, run: Run, model: LanguageModel, batch: int) -> None:
        super().__init__(run, model, batch)
        self.step = self.whole_step

    def whole_step(self) -> None:
        hidden, after = self.model.run(self.model.embed(self.token), self.state)
        self.choose(hidden)
        copy(after, self.state)

    def capture(self) -> None:
        """On the CPU it stays as it is."""
        if self.run.dry:
            return
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.whole_step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.whole_step()
        self.step = graph.replay


def copy(source: State, target: State) -> None:
    for old, new in zip(target.layers, source.layers, strict=True):
        for there, here in zip(old, new, strict=True):
            there.copy_(here)


def decode_batch(run: Run, model: LanguageModel, limits: Limits, batch: int, weights: int) -> None:
    count, name = run.size(TOKENS, 3), f"RWKV-{model.generation}, batch {batch}"
    compile_blocks(run, False)
    plain, program, fused = Plain(run, model, batch), Decoding(run, model, batch), Captured(run, model, batch)
    want = torch.cat(plain.steps(count), 1)
    begin = time.perf_counter()
    program.step()  # which makes the graph
    run.wait()
    made = time.perf_counter() - begin
    program.restart()
    equal = torch.equal(torch.cat(program.steps(count), 1), want)
    run.record(f"{name}: tokens as plain", ok=equal, detail=equal)
    things = {"plain": plain, "program": program}

    def fuse() -> None:
        plain.restart()
        plain.steps(1)
        compile_blocks(run)
        fused.steps(1)
        off = relative_error(fused.logits, plain.logits)
        run.record(f"{name}, compiled blocks: logits as plain", ok=off <= COMPILED, detail=True, error=off)
        fused.capture()
        things["graph, compiled"] = fused

    if model.generation == 6:
        run.section(f"{name}, compiled blocks", fuse)
    compile_blocks(run, False)
    if run.dry:  # no graph has kept the compiled form
        things.pop("graph, compiled", None)
    rounds = 1 if run.warm else run.size(3, 1)
    calls = {name: lambda decoding=decoding: decoding.steps(count) for name, decoding in things.items()}
    times = interleaved(run, calls | limits.things, rounds=rounds)
    _, memory = limits.of(times)
    spent = {name: seconds / count for name, seconds in medians(times).items() if name in things}
    found = {f"{name}, tokens/s": round(batch / seconds, 1) for name, seconds in spent.items()}
    found |= {f"share of reading the weights, {name}": round(weights / memory / s, 3) for name, s in spent.items()}
    run.record(f"{name}, decoding, 3B", **found, **{"first step, s": round(made, 3)})


def fast_folder(run: Run) -> Path:
    """Where a file of 7 GB is written and read soonest."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > run.size(12 * 2**30, 2**28)
    return memory if roomy else run.folder("")


def write_encoder(run: Run, folder: Path) -> None:
    """WavLM-large's form with random weights."""
    import transformers

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    small |= {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = transformers.WavLMConfig(feat_extract_norm="layer", do_stable_layer_norm=True, **run.size(large, small))
    with torch.device(run.device):
        model = transformers.WavLMModel(config).to(torch.bfloat16)
    model.cpu().save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)


def readme_memory(run: Run, generation: int) -> tuple[str, str]:
    """What README's table says of 3B: without and with grad_cp."""
    row, readme = {6: "6 3B", 7: "7 2.9B"}[generation], (run.program / "README.md").read_text()
    found = re.search(rf"^\| RWKV-{row} \|.*\| ([\d.]+ GB), ([\d.]+ GB) \|$", readme, re.M)
    return found.groups() if found else ("no such row", "no such row")
