"""The whole model on the device against the same model on the CPU."""

import json
from pathlib import Path

import soundfile
import torch

from bench.gpu.common import Run, relative_error
from bench.random_model import write_model
from rwkv_speech import SpeechRWKV
from rwkv_speech.lm.initialise import official_sizes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compare(run: Run) -> None:
    """The tiny RWKV-6, and an RWKV-7 of random weights, whose texts are noise and not compared."""
    tiny = run.program / "demo" / "tiny" / "rwkv6-tiny.pth"
    compare_model(run, tiny, texts_too=True)
    for quant in ("int8", "nf4"):
        compare_model(run, tiny, texts_too=True, quant=quant)
    path = run.folder("models") / "rwkv7.pth"
    sizes = official_sizes(generation=7, n_layer=4, n_embd=128, vocab_size=257)
    write_model(path, sizes, dtype=torch.float32, seed=0)
    compare_model(run, path, texts_too=False)


def compare_model(run: Run, language_model: Path, *, texts_too: bool, quant: str = "none") -> None:
    """Logits, loss, all gradients, greedy texts of tiny models, beside a random adapter and random states."""
    tiny = run.program / "demo" / "tiny"
    lines = [json.loads(line) for line in (tiny / "corpus" / "test.jsonl").read_text().splitlines()]
    paths = [tiny / "corpus" / line["audio"] for line in lines[: run.size(24, 3)]]
    waveforms = [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in paths[:8]]
    texts = [line["text"] for line in lines[: len(waveforms)]]
    tokens = torch.randint(1, 257, (2, run.size(200, 20)), generator=torch.Generator().manual_seed(0))

    def load(device: torch.device | str, dtype: str) -> SpeechRWKV:
        torch.manual_seed(0)
        parts = {"encoder": str(tiny / "wavlm-tiny"), "downsample_k": 1, "adapter_hidden": 64, "quant": quant}
        model = SpeechRWKV.from_pretrained(language_model, device=device, dtype=DTYPES[dtype], **parts)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, x in model.trainable_state_dict().items():
                scale = 0.1 if name.endswith("time_state") else x.shape[-1] ** -0.5
                x.copy_(torch.randn(x.shape, generator=generator) * scale)
        return model

    def results(model: SpeechRWKV) -> dict[str, torch.Tensor]:
        language_model = model.language_model
        with torch.no_grad():
            logits = language_model.logits(language_model(tokens.to(language_model.emb.weight.device))[0])
        loss = model.loss(waveforms, texts)
        loss.backward()
        found = {"logits": logits, "loss": loss}
        found |= {name: x.grad for name, x in model.trainable_state_dict().items()}
        return {name: x.detach().cpu().float() for name, x in found.items()}

    def differences(got: dict, want: dict) -> dict[str, float]:
        errors = {name: relative_error(got[name], want[name]) for name in want}
        gradients = max(error for name, error in errors.items() if name not in ("logits", "loss"))
        return {"logits": errors["logits"], "loss": errors["loss"], "gradients": gradients}

    cpu = load("cpu", "fp32")
    generation = f"RWKV-{cpu.language_model.generation}{f' in {quant}' * (quant != 'none')}"
    want = results(cpu)
    if texts_too:
        want_texts = cpu.transcribe(paths, batch_size=8)
    own = differences(results(load("cpu", "bf16")), want)
    run.record(f"{generation}, bf16 on the CPU against fp32 there", **own)
    # What bf16 costs on the CPU it may cost on the device: the order of rounding is another.
    bounds = {"fp32": dict.fromkeys(own, 1e-4), "bf16": {name: max(3e-2, 1.5 * error) for name, error in own.items()}}
    for dtype, bound in bounds.items():
        torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions is no fp32
        model = load(run.device, dtype)
        errors = differences(results(model), want)
        ok = all(errors[name] <= bound[name] for name in errors)
        run.record(f"{generation}, {dtype} against the CPU's fp32", ok=ok, **errors)
        if not texts_too:
            continue
        equal = sum(a == b for a, b in zip(model.transcribe(paths, batch_size=8), want_texts, strict=True))
        ok = equal == len(paths) if dtype == "fp32" else None
        run.record(
            f"{generation}, {dtype}, greedy texts",
            ok=ok,
            equal=f"{equal} of {len(paths)}",
            distinct=len(set(want_texts)),
        )
    torch.backends.cudnn.allow_tf32 = True
    off = differences(results(load(run.device, "fp32")), want)
    run.record(f"{generation}, fp32 with torch's default, tf32 in convolutions", **off)
