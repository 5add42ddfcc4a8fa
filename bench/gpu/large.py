"""The sizes that are used: a training step and decoding of a 3B model of random weights, and what may speed them up."""

import re
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.common import (
    Limits,
    Run,
    compile_blocks,
    interleaved,
    medians,
    profile,
    random_language_model,
    relative_error,
)
from rwkv_speech.lm.rwkv6 import RWKV6
from rwkv_speech.lm.state import State

WORDS = ["they", "came", "to", "the", "river", "in", "evening", "and", "found", "nobody", "there", "who", "knew"]
TOKENS = 60  # of 15 s of audio
ANSWER = {"max_new_tokens": TOKENS}  # what transcribe() takes to end there
COMPILED = 5e-2  # a relative difference of bf16 logits that a change of their order of rounding explains


def train(run: Run) -> None:
    """A training step of 3B beside WavLM-large's form: time against its products, memory, what takes the time."""
    from rwkv_speech import SpeechRWKV

    with TemporaryDirectory(dir=fast_folder(run)) as name:
        folder = Path(name)
        tensors = {name: x.cpu().clone() for name, x in random_language_model(run).state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        write_encoder(run, folder / "encoder")
        del tensors
        begin = time.perf_counter()
        model = SpeechRWKV.from_pretrained(
            folder / "model.safetensors", encoder=str(folder / "encoder"), device=run.device, dtype=torch.bfloat16
        )
        run.wait()
    run.record("3B and encoder read from files", seconds=round(time.perf_counter() - begin, 1))
    samples = run.size(15 * 16000, 16000)
    waveforms = [0.1 * torch.randn(samples) for _ in range(run.size(4, 2))]
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(run.size(45, 5))) for i in range(len(waveforms))]
    trained = [*model.trainable_state_dict().values()]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        model.loss(waveforms, texts).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def measured(what: str, flops: float) -> None:
        limits = Limits(run)
        times = interleaved(run, {"step": step} | limits.things, rounds=1 if run.warm else run.size(8, 1))
        spent, (peak, _) = medians(times)["step"], limits.of(times)
        found = {"ms": round(spent * 1e3, 1), "tflop": round(flops / 1e12, 3), "peak tflop/s": round(peak / 1e12, 1)}
        run.record(what, backend=run.backend, **found, **{"share of peak": round(flops / peak / spent, 3)})

    def memory(grad_cp: int) -> None:
        model.language_model.checkpointing = bool(grad_cp)
        step()
        if not run.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step()
        peak = 0 if run.dry else torch.cuda.max_memory_allocated()
        model.language_model.checkpointing = False
        said = readme_memory(run)[grad_cp]
        run.record(f"memory, grad_cp={grad_cp}", gb=round(peak / 1e9, 2), **{"README's table": said})

    step()
    with FlopCounterMode(display=False) as counter:
        model.loss(waveforms, texts).backward()
    flops = counter.get_total_flops()
    optimizer.zero_grad()
    what = f"training step, 3B, {len(waveforms)} x {samples / 16000:g} s"
    run.section(what, lambda: measured(what, flops))
    run.section("memory, grad_cp=0", lambda: memory(0))
    run.section("memory, grad_cp=1", lambda: memory(1))
    run.section("profile of a step", lambda: run.record("profile of a step", **profile(run, step)))
    run.section("transcribe", lambda: real_time_factor(run, model, waveforms[0]))

    def compiled() -> None:
        loss = model.loss(waveforms, texts).detach()
        compile_blocks(run)
        off = relative_error(model.loss(waveforms, texts), loss)
        run.record("compiled blocks agree", ok=off <= COMPILED, detail=True, error=off)
        measured(f"{what}, compiled blocks", flops)

    run.section("compiled blocks", compiled)


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
    """Tokens a second, plain and with the remedies, against reading the weights once a token."""
    model = random_language_model(run)
    limits = Limits(run)
    weights = sum(x.nbytes for name, x in model.named_parameters() if name != "emb.weight")
    with torch.inference_mode():
        for batch in run.size((1, 16, 64), (1, 2)):
            run.section(f"batch {batch}", lambda: decode_batch(run, model, limits, batch, weights))  # noqa: B023
        compile_blocks(run, False)
        decoding = Decoding(run, model, 1)
        decoding.steps(2)
        run.section("profile", lambda: run.record("profile of 5 tokens", **profile(run, lambda: decoding.steps(5))))


class Decoding:
    """Greedy decoding of a batch with all that a step reads and writes in the same memory: what a graph needs."""

    def __init__(self, run: Run, model: RWKV6, batch: int) -> None:
        self.run, self.model = run, model
        generator = torch.Generator().manual_seed(batch)
        prompt = torch.randint(1, model.sizes.vocab_size, (batch, 4), generator=generator).to(run.device)
        _, self.state = model(prompt)
        self.token, self.first_token = prompt[:, -1:].clone(), prompt[:, -1:].clone()
        self.state = self.state.clone()
        self.first_state = self.state.clone()
        self.step = self.plain_step

    def plain_step(self) -> None:
        hidden, after = self.model(self.token, self.state)
        self.logits = self.model.logits(hidden[:, -1])
        self.token.copy_(self.logits.argmax(-1, keepdim=True))
        copy(after, self.state)

    def restart(self) -> None:
        copy(self.first_state, self.state)
        self.token.copy_(self.first_token)

    def steps(self, count: int) -> list[Tensor]:
        tokens = []
        for _ in range(count):
            self.step()
            tokens.append(self.token.clone())
        return tokens

    def capture(self) -> None:
        """The step as one CUDA graph; on the CPU it stays as it is."""
        if self.run.dry:
            return
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.plain_step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.plain_step()
        self.step = graph.replay


def copy(source: State, target: State) -> None:
    for old, new in zip(target.layers, source.layers, strict=True):
        for there, here in zip(old, new, strict=True):
            there.copy_(here)


def decode_batch(run: Run, model: RWKV6, limits: Limits, batch: int, weights: int) -> None:
    count = run.size(TOKENS, 3)
    compile_blocks(run, False)
    plain, graph, fused = (Decoding(run, model, batch) for _ in range(3))
    want = torch.cat(plain.steps(count), 1)
    things = {"plain": plain}
    graph.capture()
    graph.restart()
    equal = torch.equal(torch.cat(graph.steps(count), 1), want)
    run.record(f"batch {batch}, graph: tokens as plain", ok=equal, detail=equal)
    things["graph"] = graph

    def fuse() -> None:
        plain.restart()
        plain.steps(1)
        compile_blocks(run)
        fused.steps(1)
        off = relative_error(fused.logits, plain.logits)
        run.record(f"batch {batch}, compiled blocks: logits as plain", ok=off <= COMPILED, detail=True, error=off)
        fused.capture()
        things["graph, compiled"] = fused

    run.section(f"batch {batch}, compiled blocks", fuse)
    compile_blocks(run, False)
    if run.dry:  # no graph has kept the compiled form
        things.pop("graph, compiled", None)
    rounds = 1 if run.warm else run.size(5, 1)
    calls = {name: lambda decoding=decoding: decoding.steps(count) for name, decoding in things.items()}
    times = interleaved(run, calls | limits.things, rounds=rounds)
    _, memory = limits.of(times)
    spent = {name: seconds / count for name, seconds in medians(times).items() if name in things}
    found = {f"{name}, tokens/s": round(batch / seconds, 1) for name, seconds in spent.items()}
    found |= {f"share of reading the weights, {name}": round(weights / memory / s, 3) for name, s in spent.items()}
    run.record(f"decoding, 3B, batch {batch}", **found)


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


def readme_memory(run: Run) -> tuple[str, str]:
    """What README's table says of 3B: without and with grad_cp."""
    found = re.search(
        r"^\| RWKV-6 3B \|.*\| ([\d.]+ GB), ([\d.]+ GB) \|$", (run.program / "README.md").read_text(), re.M
    )
    return found.groups() if found else ("no such row", "no such row")
