"""The WKV operator on the device: right (`check`, `sanitize`) and fast (`measure`)."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu.common import Limits, Run, interleaved, medians, relative_error
from rwkv_speech.lm import wkv
from rwkv_speech.lm.wkv6 import wkv6_reference

NAMES = ("y", "final_state", "gr", "gk", "gv", "gw", "gu", "g_state")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}  # of a relative error, in norm
AGREEMENT = 2e-2  # with the kernels of fla, in bf16
# Microseconds for bf16 on an H100 as docs/wkv-cuda.md reckons them, at 70 % of the issue slots: (B, T, H) -> forward,
# forward and backward. The page has no forward alone at 70 %: that one is with every slot used.
RECKONED = {(4, 256, 40): (42, 232), (4, 1500, 40): (244, 1360)}

Inputs = list[Tensor]


def make_inputs(B: int, T: int, H: int, N: int, *, dtype: str, shared: bool, device: object = "cpu") -> Inputs:
    """r, k, v, w, u, state; decays from one that forgets at once (w = 3) to one that hardly forgets (w = -7)."""
    generator = torch.Generator(device).manual_seed(T)
    r, k, v, z = torch.randn(4, B, T, H, N, generator=generator, device=device)
    w = torch.sigmoid(z) * 10 - 7
    u = torch.randn(H, N, generator=generator, device=device)
    state = torch.randn((H, N, N) if shared else (B, H, N, N), generator=generator, device=device)
    return [*(x.to(DTYPES[dtype]) for x in (r, k, v, w)), u, state]


def both(operator: Callable, inputs: Inputs, lengths: Tensor | None, grads: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Values and all six gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = operator(*leaves, lengths)
    found = torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])
    return dict(zip(NAMES, (*(y.detach() for y in outputs), *found), strict=True))


def reference(r, k, v, w, u, state, lengths):
    """The fp64 loops; a long sequence goes piece by piece, which spares autograd work that is quadratic in T."""
    if lengths is not None or r.shape[1] <= 256:
        return wkv6_reference(r, k, v, w, u, state, lengths)
    pieces = []
    for parts in zip(*(x.split(128, dim=1) for x in (r, k, v, w)), strict=True):
        y, state = wkv6_reference(*parts, u, state)
        pieces.append(y)
    return torch.cat(pieces, 1), state


def check(run: Run) -> None:
    """Values and gradients against fp64; torch's own checks of an operator; the same result twice."""
    torch.set_num_threads(1)
    run.record("backend", name=run.backend)
    worst = {"cases": 0, "wrong": 0, "fp32": 0.0, "bf16": 0.0, "fp16": 0.0}

    def case(B: int, T: int, H: int, N: int, dtype: str, shared: bool, lengths: bool, on_device: bool = False) -> None:
        of = torch.tensor([max(1, T - 5 * b - T // 3) for b in range(B)]) if lengths else None
        inputs = make_inputs(B, T, H, N, dtype=dtype, shared=shared)
        grads = torch.randn(B, T, H, N).to(DTYPES[dtype]), torch.randn(B, H, N, N)
        there = [[x.to(run.device) for x in inputs], of if of is None else of.to(run.device)]
        grads_there = tuple(g.to(run.device) for g in grads)
        want = both(reference, *there, grads_there) if on_device else both(reference, inputs, of, grads)
        got = both(wkv.wkv6, *there, grads_there)
        errors = {name: relative_error(got[name], want[name]) for name in NAMES}
        ok = all(error <= BOUNDS[dtype] for error in errors.values())  # a NaN is not <= either
        largest = max(errors, key=errors.get)
        worst["cases"] += 1
        worst["wrong"] += not ok
        worst[dtype] = max(worst[dtype], errors[largest])
        name = f"B{B}-T{T}-H{H}-N{N}-{dtype}{'-shared' * shared}{'-lengths' * lengths}"
        run.record(name, ok=ok, detail=True, largest=largest, error=errors[largest])

    short = run.size((1, 2, 24, 25, 70), (25,))
    for T, N, dtype, shared, lengths in product(short, (32, 64, 128), DTYPES, (False, True), (False, True)):
        if T == 70 or (N == 64 and shared == lengths):
            case(2, T, 3, N, dtype, shared, lengths)
    for (B, T, H), dtype in product(run.size([(2, 257, 2), (1, 1024, 2), (1, 4096, 1)], [(1, 300, 1)]), DTYPES):
        case(B, T, H, 64, dtype, True, T < 300)
    for dtype in ("fp32", "bf16"):  # as many blocks as a real batch has
        case(*run.size((4, 256, 40, 64), (2, 20, 4, 64)), dtype, True, False, on_device=True)
    run.record("values and gradients against fp64", ok=not worst["wrong"], **worst)

    inputs = [x.to(run.device).requires_grad_() for x in make_inputs(2, 40, 2, 32, dtype="fp32", shared=True)]
    for lengths in (None, torch.tensor([40, 7], device=run.device)):
        torch.library.opcheck(torch.ops.rwkv_speech.wkv6.default, (*inputs, lengths, True))
    run.record("opcheck", ok=True)

    B, T, H, N = run.size((4, 256, 40, 64), (2, 30, 2, 64))
    inputs = make_inputs(B, T, H, N, dtype="bf16", shared=True, device=run.device)
    grads = torch.randn(B, T, H, N, device=run.device).bfloat16(), torch.randn(B, H, N, N, device=run.device)
    first = both(wkv.wkv6, inputs, None, grads)
    again = [both(wkv.wkv6, inputs, None, grads) for _ in range(5)]
    run.record("the same result six times", ok=all(torch.equal(x[name], first[name]) for x in again for name in NAMES))
    run.section("as plain torch, long", lambda: long_sequences(run))


def long_sequences(run: Run) -> None:
    """The largest shape that is timed, against the chunks of products in fp32."""
    B, T, H, N = run.size((8, 4096, 64, 64), (2, 100, 2, 64))
    inputs = make_inputs(B, T, H, N, dtype="bf16", shared=False, device=run.device)
    grads = torch.randn_like(inputs[0]), torch.randn(B, H, N, N, device=run.device)
    got = both(wkv.wkv6, inputs, None, grads)
    wkv.set_backend("torch")
    want = both(wkv.wkv6, inputs, None, grads)
    wkv.set_backend(run.wkv)
    errors = {name: relative_error(got[name], want[name]) for name in NAMES}
    ok = all(error <= BOUNDS["bf16"] for error in errors.values())
    run.record(f"against chunks of products, B{B}-T{T}-H{H}", ok=ok, error=max(errors.values()))


def sanitize(run: Run) -> None:
    """compute-sanitizer over small shapes: memory that is not the kernels' own, and races in shared memory."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    tool = next((place for place in places if place and Path(place).exists()), None)
    if not tool and not run.dry:
        run.record("compute-sanitizer", reason="not installed here")
        return
    inner = [sys.executable, "-m", "bench.gpu.run", "sanitized", "--results", run.results, "--work", run.work]
    inner += ["--program", run.program, *["--dry"] * run.dry]
    tools = {"memcheck": [], "racecheck": []} if not run.dry else {"without": []}
    running = {}
    for name in tools:
        command = inner if run.dry else [tool, "--tool", name, "--error-exitcode", "9", *inner]
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a tensor's neighbour is memory, too
        running[name] = subprocess.Popen(
            [*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for name, process in running.items():
        said = process.communicate()[0]
        print(said)
        found = next((line for line in said.splitlines() if "SUMMARY" in line), said.strip()[-200:])
        run.record(f"compute-sanitizer, {name}", ok=process.returncode == 0, said=found)


def sanitized(run: Run) -> None:
    for N, dtype in product(run.size((32, 64, 128), (32,)), DTYPES):
        inputs = [x.to(run.device) for x in make_inputs(2, 49, 2, N, dtype=dtype, shared=N == 64)]
        grads = torch.randn_like(inputs[0]), torch.randn(2, 2, N, N, device=run.device)
        both(wkv.wkv6, inputs, torch.tensor([49, 1 + N % 5], device=run.device), grads)
        run.wait()


def loop(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as its formula reads, in torch, left to autograd."""
    r, k, v, w = (x.float() for x in (r, k, v, w))
    S, decay, y = S.expand(r.shape[0], *S.shape[-3:]), torch.exp(-torch.exp(w)), []
    for t in range(r.shape[1]):
        kv = v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append(((S + u[:, None] * kv) * r[:, t, :, None, :]).sum(-1))
        S = decay[:, t, :, None, :] * S + kv
    return torch.stack(y, 1), S


def measure(run: Run) -> None:
    """Times, each beside the others in the same rounds."""
    shapes = run.size([(4, 256, 40), (4, 1500, 40), (8, 4096, 64)], [(2, 20, 2), (2, 40, 2)])
    for B, T, H in shapes:
        run.section(f"B{B} T{T} H{H}", lambda: measure_shape(run, B, T, H))  # noqa: B023


def measure_shape(run: Run, B: int, T: int, H: int) -> None:
    N, dtype = 64, "bf16"
    inputs = make_inputs(B, T, H, N, dtype=dtype, shared=False, device=run.device)
    gy, g_final = torch.randn_like(inputs[0]), torch.randn(B, H, N, N, device=run.device)
    leaves = [x.requires_grad_() for x in inputs]

    def train(operator: Callable, leaves: Inputs, g_final: Tensor = g_final) -> tuple[Tensor, ...]:
        y, final = operator(*leaves)
        return torch.autograd.grad((y, final), leaves, (gy.to(y.dtype), g_final.to(final.dtype)))

    def forward(operator: Callable, leaves: Inputs) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return operator(*leaves)

    things = {
        "ours, forward": lambda: forward(wkv.wkv6, leaves),
        "ours, both": lambda: train(wkv.wkv6, leaves),
    }
    if fla := fla_kernels(run):
        rate = -torch.exp(leaves[3].detach().float())  # what fla takes for w; it keeps states as [key, value]
        theirs = [*(x.detach() for x in leaves[:3]), rate, leaves[4].detach(), leaves[5].detach().mT.contiguous()]
        theirs = [x.requires_grad_() for x in theirs]
        got, want = train(wkv.wkv6, leaves), list(train(fla, theirs, g_final.mT))
        want[3], want[5] = want[3] * rate, want[5].mT
        outputs = zip(forward(wkv.wkv6, leaves), forward(fla, theirs), strict=True)
        (y, other_y), (final, other_final) = outputs
        pairs = [(y, other_y), (final, other_final.mT), *zip(got, want, strict=True)]
        errors = {name: relative_error(*pair) for name, pair in zip(NAMES, pairs, strict=True)}
        agree = all(error <= AGREEMENT for error in errors.values())
        run.record(f"B{B} T{T} H{H}, ours and fla agree", ok=agree, detail=agree, **errors)
        del got, want, outputs, y, other_y, final, other_final, pairs
        if agree:
            theirs[3] = rate.to(theirs[0].dtype).requires_grad_()  # as many bytes as ours
            things["fla, forward"] = lambda: forward(fla, theirs)
            things["fla, both"] = lambda: train(fla, theirs, g_final.mT)
    slow = {"loop, forward": lambda: forward(loop, leaves)}
    if B * T * H <= 4 * 1500 * 40:  # more would not fit in memory
        slow["loop, both"] = lambda: train(loop, leaves)

    rounds = 1 if run.warm else run.size(10, 1)
    limits = Limits(run)
    times = interleaved(run, things | limits.things, rounds=rounds, queued=True)
    if not run.warm:
        times |= interleaved(run, slow, rounds=1)
    t = medians(times)
    _, memory = limits.of(times)
    # r, k, v, w are read and y is written once; a state comes in and goes out.
    size = 5 * leaves[0].nbytes + 2 * leaves[5].nbytes
    found = {f"{name}, us": round(seconds * 1e6, 1) for name, seconds in t.items() if "limit" not in name}
    for pass_ in ("forward", "both"):
        for other in ("fla", "loop"):
            if f"{other}, {pass_}" in t:
                found[f"{other}/ours, {pass_}"] = round(t[f"{other}, {pass_}"] / t[f"ours, {pass_}"], 2)
    for pass_, reckoned in zip(("forward", "both"), RECKONED.get((B, T, H), ()), strict=False):
        found[f"measured/reckoned, {pass_}"] = round(t[f"ours, {pass_}"] * 1e6 / reckoned, 2)
    # What small tensors leave in the cache is not read again from memory, so that this is no share of a limit there.
    if leaves[0].nbytes > 2**27 or run.dry:
        found["share of bandwidth, forward"] = round(size / memory / t["ours, forward"], 3)
    run.record(f"B{B} T{T} H{H} bf16", backend=run.backend, **found)


def fla_kernels(run: Run) -> Callable | None:
    """RWKV-6 as flash-linear-attention computes it, from (r, k, v, -exp(w), u, state [key, value])."""
    if run.dry:
        return lambda r, k, v, rate, u, S: in_fla_form(r, k, v, rate, u, S)
    try:
        from fla.ops.rwkv6 import chunk_rwkv6
    except Exception as error:  # absent, or made for another Triton
        run.record("fla", reason=f"{type(error).__name__}: {error}"[:200])
        return None
    return lambda r, k, v, rate, u, S: chunk_rwkv6(
        r, k, v, rate, u, scale=1.0, initial_state=S, output_final_state=True
    )


def in_fla_form(r, k, v, rate, u, S):
    """The loop as fla would have it: stands in for its kernels in a dry run."""
    y, final = loop(r, k, v, torch.log(-rate.float()), u, S.mT)
    return y.to(r.dtype), final.mT
