"""The WKV operators on the device: right (`check`, `sanitize`) and fast (`measure`)."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu.common import GENERATIONS, Limits, Run, interleaved, medians, relative_error
from bench.wkv import loop6, loop7
from rwkv_speech.lm import wkv
from rwkv_speech.lm.wkv6 import wkv6_reference
from rwkv_speech.lm.wkv7 import wkv7_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}  # of a relative error, in norm
AGREEMENT = 2e-2  # with the kernels of fla, in bf16

Inputs = list[Tensor]


@dataclass(frozen=True)
class Case:
    """The operator of a generation.

    reckoned: microseconds for bf16 on an H100 as docs/wkv-cuda.md reckons them: (B, T, H) -> forward with every issue
    slot used, forward and backward at 70 % of them.
    """

    operator: wkv.Operator
    run: Callable[..., tuple[Tensor, Tensor]]
    reference: Callable[..., tuple[Tensor, Tensor]]
    loop: Callable[..., tuple[Tensor, Tensor]]
    reckoned: dict[tuple[int, int, int], tuple[int, int]]

    @property
    def names(self) -> list[str]:
        return ["y", "final_state", *(f"g{name}" for name in self.operator.inputs), "g_state"]

    def inputs(self, B: int, T: int, H: int, N: int, *, dtype: str, shared: bool, device: object = "cpu") -> Inputs:
        """The operator's inputs and the state; decays from the strongest to those that hardly forget."""
        generator = torch.Generator(device).manual_seed(T)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        values = {name: normal(B, T, H, N) for name in self.operator.steps}
        values |= {name: normal(H, N) for name in self.operator.heads}
        if self.operator is wkv.WKV6:
            values["w"] = torch.sigmoid(values["w"]) * 10 - 7
        else:
            values["w"] = torch.sigmoid(values["w"]) * 14 - 8
            values["a"] = -torch.nn.functional.normalize(values["a"], dim=-1)
            values["b"] = -values["a"] * torch.sigmoid(values["b"])
        state = normal(H, N, N) if shared else normal(B, H, N, N)
        steps = (values[name].to(DTYPES[dtype]) for name in self.operator.steps)
        return [*steps, *(values[name] for name in self.operator.heads), state]

    def both(self, run: Callable, inputs: Inputs, lengths: Tensor | None, grads: tuple[Tensor, Tensor]) -> dict:
        """Values and all gradients, by name."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = run(*leaves, lengths)
        found = torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])
        return dict(zip(self.names, (*(y.detach() for y in outputs), *found), strict=True))

    def in_fp64(self, *args: Tensor | None) -> tuple[Tensor, Tensor]:
        """The fp64 loops; a long sequence goes piece by piece, which spares autograd work that is quadratic in T."""
        *inputs, state, lengths = args
        if lengths is not None or inputs[0].shape[1] <= 256:
            return self.reference(*args)
        n, pieces = len(self.operator.steps), []
        for parts in zip(*(x.split(128, dim=1) for x in inputs[:n]), strict=True):
            y, state = self.reference(*parts, *inputs[n:], state)
            pieces.append(y)
        return torch.cat(pieces, 1), state


CASES = {
    6: Case(wkv.WKV6, wkv.wkv6, wkv6_reference, loop6, {(4, 256, 40): (42, 232), (4, 1500, 40): (244, 1360)}),
    7: Case(wkv.WKV7, wkv.wkv7, wkv7_reference, loop7, {(4, 256, 40): (74, 486), (4, 1500, 40): (433, 2850)}),
}


def check(run: Run, generation: int = 6) -> None:
    """Values and gradients against fp64; torch's own checks of an operator; the same result twice."""
    torch.set_num_threads(1)
    run.record("backend", name=run.backend)
    for what, do in (
        ("values and gradients against fp64", against_fp64),
        ("opcheck", opcheck),
        ("the same result six times", repeats),
        ("against chunks of products", against_chunks),
    ):
        run.section(what, lambda: do(run, CASES[generation], what))  # noqa: B023


def check7(run: Run) -> None:
    check(run, 7)


def against_fp64(run: Run, case: Case, what: str) -> None:
    worst = {"cases": 0, "wrong": 0, "fp32": 0.0, "bf16": 0.0, "fp16": 0.0}

    def one(B: int, T: int, H: int, N: int, dtype: str, shared: bool, lengths: bool, on_device: bool = False) -> None:
        each = torch.tensor([max(1, T - 5 * b - T // 3) for b in range(B)]) if lengths else None
        inputs = case.inputs(B, T, H, N, dtype=dtype, shared=shared)
        grads = torch.randn(B, T, H, N).to(DTYPES[dtype]), torch.randn(B, H, N, N)
        there = ([x.to(run.device) for x in inputs], None if each is None else each.to(run.device))
        there += (tuple(g.to(run.device) for g in grads),)
        want = case.both(case.in_fp64, *(there if on_device else (inputs, each, grads)))
        got = case.both(case.run, *there)
        errors = {name: relative_error(got[name], want[name]) for name in case.names}
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
            one(2, T, 3, N, dtype, shared, lengths)
    for (B, T, H), dtype in product(run.size([(2, 257, 2), (1, 1024, 2), (1, 4096, 1)], [(1, 300, 1)]), DTYPES):
        one(B, T, H, 64, dtype, True, T < 300)
    for dtype in ("fp32", "bf16"):  # as many blocks as a real batch has
        one(*run.size((4, 256, 40, 64), (2, 20, 4, 64)), dtype, True, False, on_device=True)
    run.record(what, ok=not worst["wrong"], **worst)


def opcheck(run: Run, case: Case, what: str) -> None:
    inputs = [x.to(run.device).requires_grad_() for x in case.inputs(2, 40, 2, 32, dtype="fp32", shared=True)]
    operator = getattr(torch.ops.rwkv_speech, case.operator.name)
    for lengths in (None, torch.tensor([40, 7], device=run.device)):
        torch.library.opcheck(operator.default, (*inputs, lengths, True))
    run.record(what, ok=True)


def repeats(run: Run, case: Case, what: str) -> None:
    B, T, H, N = run.size((4, 256, 40, 64), (2, 30, 2, 64))
    inputs = case.inputs(B, T, H, N, dtype="bf16", shared=True, device=run.device)
    grads = torch.randn_like(inputs[0]), torch.randn(B, H, N, N, device=run.device)
    first = case.both(case.run, inputs, None, grads)
    again = [case.both(case.run, inputs, None, grads) for _ in range(5)]
    run.record(what, ok=all(torch.equal(x[name], first[name]) for x in again for name in case.names))


def against_chunks(run: Run, case: Case, what: str) -> None:
    """The largest shape that is timed, against the chunks of products in fp32."""
    B, T, H, N = run.size((8, 4096, 64, 64), (2, 100, 2, 64))
    inputs = case.inputs(B, T, H, N, dtype="bf16", shared=False, device=run.device)
    grads = torch.randn_like(inputs[0]), torch.randn(B, H, N, N, device=run.device)
    got = case.both(case.run, inputs, None, grads)
    wkv.set_backend("torch")
    want = case.both(case.run, inputs, None, grads)
    wkv.set_backend(run.wkv)
    errors = {name: relative_error(got[name], want[name]) for name in case.names}
    ok = all(error <= BOUNDS["bf16"] for error in errors.values())
    run.record(what, ok=ok, shape=f"B{B}-T{T}-H{H}", error=max(errors.values()))


def sanitize(run: Run) -> None:
    """compute-sanitizer over small shapes: memory that is not the kernels' own, and races in shared memory."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    tool = next((place for place in places if place and Path(place).exists()), None)
    if not tool and not run.dry:
        run.record("compute-sanitizer", reason="not installed here")
        return
    inner = [sys.executable, "-m", "bench.gpu.run", "sanitized", "--results", run.results, "--work", run.work]
    inner += ["--program", run.program, "--wkv", run.wkv, *["--dry"] * run.dry]
    running = {}
    for name in run.size(("memcheck", "racecheck"), ("without",)):
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
    for case, N, dtype in product(CASES.values(), run.size((32, 64, 128), (32,)), ("fp32", "bf16")):
        inputs = case.inputs(2, 49, 2, N, dtype=dtype, shared=N == 64, device=run.device)
        grads = torch.randn_like(inputs[0]), torch.randn(2, 2, N, N, device=run.device)
        case.both(case.run, inputs, torch.tensor([49, 1 + N % 5], device=run.device), grads)
        run.wait()


def measure(run: Run) -> None:
    """Both operators beside the plain loop, what docs/wkv-cuda.md reckons, and the memory's bandwidth."""
    for generation in GENERATIONS:
        for_each_shape(run, generation, against_loop)


def measure_fla(run: Run) -> None:
    """RWKV-6's operator beside the kernels of flash-linear-attention, after checking that both compute the same."""
    fla = fla_kernels(run)
    if fla:
        for_each_shape(run, 6, partial(against_fla, fla=fla))


def for_each_shape(run: Run, generation: int, against: Callable) -> None:
    case = CASES[generation]
    for B, T, H in run.size([(4, 256, 40), (4, 1500, 40), (8, 4096, 64)], [(2, 20, 2), (2, 40, 2)]):
        inputs = case.inputs(B, T, H, 64, dtype="bf16", shared=False, device=run.device)
        g_final = torch.randn(B, H, 64, 64, device=run.device)
        problem = Problem(case, [x.requires_grad_() for x in inputs], torch.randn_like(inputs[0]), g_final)
        what = f"RWKV-{generation} B{B} T{T} H{H}"
        run.section(what, lambda: against(run, problem, f"{what} bf16"))  # noqa: B023


@dataclass
class Problem:
    """An operator, its inputs, and the gradients of both outputs."""

    case: Case
    inputs: Inputs
    gy: Tensor
    g_final: Tensor

    def forward(self, operator: Callable) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return operator(*self.inputs)

    def both(self, operator: Callable) -> tuple[Tensor, ...]:
        y, final = operator(*self.inputs)
        gradients = self.gy.to(y.dtype), self.g_final.to(final.dtype)
        return (y, final, *torch.autograd.grad((y, final), self.inputs, gradients))


def against_loop(run: Run, problem: Problem, what: str) -> None:
    limits, case, r, state = Limits(run), problem.case, problem.inputs[0], problem.inputs[-1]
    ours = {"forward": lambda: problem.forward(case.run), "both": lambda: problem.both(case.run)}
    times = interleaved(run, ours | limits.things, rounds=run.size(10, 1), queued=True)
    t = medians(times)
    found = {f"{pass_}, us": round(t[pass_] * 1e6, 1) for pass_ in ours}
    if r.shape[1] < 4096:  # more than that would fit neither in memory nor in the time
        slow = {"forward": lambda: problem.forward(case.loop), "both": lambda: problem.both(case.loop)}
        of_loop = medians(interleaved(run, slow, rounds=1))
        found |= {f"loop/ours, {pass_}": round(seconds / t[pass_], 1) for pass_, seconds in of_loop.items()}
    for pass_, reckoned in zip(ours, case.reckoned.get(r.shape[:3], ()), strict=False):
        found[f"measured/reckoned, {pass_}"] = round(t[pass_] * 1e6 / reckoned, 2)
    # The inputs are read and y is written once, a state comes in and goes out. Small tensors stay in the cache: of them
    # the time says nothing about the memory.
    if r.nbytes > 2**27 or run.dry:
        size = (len(case.operator.steps) + 1) * r.nbytes + 2 * state.nbytes
        found["share of bandwidth, forward"] = round(size / limits.of(times)[1] / t["forward"], 3)
    run.record(what, backend=run.backend, **found)


def against_fla(run: Run, problem: Problem, what: str, *, fla: Callable) -> None:
    r, k, v, w, u, state = (x.detach() for x in problem.inputs)
    rate = -torch.exp(w.float())  # what fla takes for w; it keeps states as [key, value]
    theirs = [x.requires_grad_() for x in (r, k, v, rate, u, state.mT.contiguous())]
    other = Problem(problem.case, theirs, problem.gy, problem.g_final.mT.contiguous())
    want, got = problem.both(wkv.wkv6), list(other.both(fla))
    got[1], got[5], got[7] = got[1].mT, got[5] * rate, got[7].mT
    errors = {name: relative_error(*pair) for name, *pair in zip(problem.case.names, got, want, strict=True)}
    agree = all(error <= AGREEMENT for error in errors.values())
    run.record(f"{what}, fla agrees", ok=agree, detail=agree, **errors)
    if not agree:
        return
    del want, got
    other.inputs[3] = rate.detach().to(r.dtype).requires_grad_()  # as many bytes as ours
    things = {
        "ours, forward": lambda: problem.forward(wkv.wkv6),
        "fla, forward": lambda: other.forward(fla),
        "ours, both": lambda: problem.both(wkv.wkv6),
        "fla, both": lambda: other.both(fla),
    }
    t = medians(interleaved(run, things, rounds=run.size(10, 1), queued=True))
    ratios = {f"fla/ours, {pass_}": round(t[f"fla, {pass_}"] / t[f"ours, {pass_}"], 2) for pass_ in ("forward", "both")}
    run.record(f"{what}, beside fla", **{f"{name}, us": round(x * 1e6, 1) for name, x in t.items()}, **ratios)


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
    y, final = loop6(r, k, v, torch.log(-rate.float()), u, S.mT)
    return y.to(r.dtype), final.mT
