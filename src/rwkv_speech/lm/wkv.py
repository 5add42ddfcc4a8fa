"""The WKV operators of RWKV-6 and RWKV-7: a function for each, and three ways to compute them.

- `cuda`: the kernels of `cuda/*.cu`, on NVIDIA GPUs.
- `cpu`: `cuda/*_cpu.cpp`, vectorised and parallel over batch and heads.
- `torch`: chunks of matrix products, anywhere, for want of a compiler.

All are held against the fp64 loops of `wkv6.py` and `wkv7.py`. Both are torch custom operators with fake and autograd
rules, so they can be compiled, checkpointed and traced.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.lm import extension
from rwkv_speech.lm.chunked import Chunk, Chunked
from rwkv_speech.lm.wkv6 import Chunk6
from rwkv_speech.lm.wkv7 import Chunk7

log = logging.getLogger("rwkv_speech")

HEAD_SIZES = (32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "cuda", "cpu", "torch")


@dataclass(frozen=True)
class Operator:
    """What distinguishes one generation's operator from the other's."""

    name: str
    steps: tuple[str, ...]
    """Inputs (B, T, H, N) of one dtype, r first. `w` is what the decay is computed from."""
    heads: tuple[str, ...]
    """Inputs (H, N) in fp32, shared by the batch, which follow."""
    chunk: type[Chunk]
    """Some steps of it in plain torch."""
    saved_every: dict[str, int]
    """Steps between the states that each compiled backend saves."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.steps + self.heads


WKV6 = Operator("wkv6", ("r", "k", "v", "w"), ("u",), Chunk6, {"cpu": 32, "cuda": 24})
WKV7 = Operator("wkv7", ("r", "w", "k", "v", "a", "b"), (), Chunk7, {"cpu": 32, "cuda": 16})


@dataclass(frozen=True)
class Backend:
    """One way to compute an operator.

    `forward(*inputs, state, lengths, save_states)` gives y, the final state, and the state before every `chunk`-th
    step; `backward(*inputs, chunk_states, lengths, gy, g_final)` gives the gradients of the inputs, those of inputs
    (H, N) for each sample, and that of the state for each sample.
    """

    name: str
    chunk: int
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


_requested = "auto"


def set_backend(name: str) -> None:
    """Chooses how the operators are computed from now on: `auto` (the best there is for each device), or one by name.

    Raises:
        ValueError: not one of BACKENDS.
    """
    global _requested
    if name not in BACKENDS:
        raise ValueError(f"no WKV backend {name!r}; there are {', '.join(BACKENDS)}")
    _requested = name


def backend(device_type: str, operator: Operator = WKV6) -> Backend:
    """The backend for tensors on this type of device; what was chosen is said once in the log.

    Raises:
        UserError: a backend was asked for by name that does not work here.
    """
    return _choose(device_type, operator.name, _requested)


@functools.cache
def _choose(device_type: str, operator: str, requested: str) -> Backend:
    name = requested
    if requested == "auto":
        name = device_type if device_type in ("cpu", "cuda") else "torch"
    elif requested in ("cpu", "cuda") and requested != device_type:
        raise UserError(f"--wkv {requested} does not compute on a {device_type} device: use auto or torch")
    try:
        chosen = _load(name, _OPERATORS[operator])
    except extension.BuildError as error:
        if requested != "auto":
            raise UserError(f"--wkv {requested} cannot be built: {error}") from error
        _warn(f"the WKV operator falls back to plain torch, which is slower: {error}")
        chosen = _load("torch", _OPERATORS[operator])
    log.info("%s on %s: %s", operator, device_type, chosen.name)
    return chosen


@functools.cache
def _warn(message: str) -> None:
    """Once, though both operators may be asked for."""
    log.warning(message)


def _load(name: str, operator: Operator) -> Backend:
    if name == "torch":
        chunked = Chunked(operator.chunk, operator.steps)
        return Backend("torch", operator.chunk.STEPS, chunked.forward, chunked.backward)
    extension.load_cpu() if name == "cpu" else extension.load_cuda()
    ops = getattr(torch.ops, f"rwkv_speech_{name}")
    forward, backward = (getattr(ops, f"{operator.name}_{way}") for way in ("forward", "backward"))
    return Backend(name, operator.saved_every[name], forward, backward)


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence of RWKV-6 over T steps (Peng et al. 2024, arXiv:2404.05892, eq. 18-19).

    For each sample and head, with the decay d = exp(-exp(w)),

        y_t[i]  = sum_j r_t[j] (S[i,j] + u[j] k_t[j] v_t[i])
        S[i,j] <- d_t[j] S[i,j] + k_t[j] v_t[i]

    computed in fp32 and differentiable in all six inputs, also through the final state.

    Args:
        r, k, v, w: (B, T, H, N), one dtype of fp32, bf16, fp16; T >= 1, N one of 32, 64, 128.
        u: (H, N), the bonus of the current token.
        state: the state before the first step, index [value, key]: (H, N, N) shared by the batch, or (B, H, N, N).
        lengths: (B,) integers in 1..T, the steps of each sample; None: T for all.

    Returns:
        y (B, T, H, N) in the dtype of r, zero after each sample's length, and the state after each sample's last
        step, (B, H, N, N) in fp32.

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    return _run(WKV6, (r, k, v, w, u), state, lengths)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence of RWKV-7 over T steps (Peng et al. 2025, arXiv:2503.14456).

    For each sample and head, with the decay d = exp(-exp(-1/2) sigmoid(w)) in (0.545, 1),

        S[i,j] <- d_t[j] S[i,j] + b_t[j] sum_l S[i,l] a_t[l] + k_t[j] v_t[i]
        y_t[i]  = sum_j S[i,j] r_t[j]

    computed in fp32 and differentiable in all seven inputs, also through the final state.

    Args:
        r, w, k, v, a, b: (B, T, H, N), one dtype of fp32, bf16, fp16; T >= 1, N one of 32, 64, 128. In the model
            a is minus the normalised key and b that key times the learning rate.
        state, lengths: as those of `wkv6`.

    Returns:
        What `wkv6` returns.

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    return _run(WKV7, (r, w, k, v, a, b), state, lengths)


def _run(
    operator: Operator, inputs: tuple[Tensor, ...], state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check(operator, inputs, state, lengths)
    steps, heads = inputs[: len(operator.steps)], inputs[len(operator.steps) :]
    inputs = (*(x.contiguous() for x in steps), *(x.float().contiguous() for x in (*heads, state)))
    if lengths is not None:
        lengths = lengths.to(device=state.device, dtype=torch.int64)
    train = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, final_state, _ = getattr(torch.ops.rwkv_speech, operator.name)(*inputs, lengths, train)
    return y, final_state


def _check(operator: Operator, inputs: tuple[Tensor, ...], state: Tensor, lengths: Tensor | None) -> None:
    name, names = operator.name, ", ".join(operator.steps)
    steps, heads = inputs[: len(operator.steps)], inputs[len(operator.steps) :]
    r = steps[0]
    if r.dim() != 4 or any(x.shape != r.shape for x in steps):
        shapes = ", ".join(str(tuple(x.shape)) for x in steps)
        raise ValueError(f"{name}: {names} must have one shape (B, T, H, N), not {shapes}")
    B, T, H, N = r.shape
    if N not in HEAD_SIZES or T < 1:
        raise ValueError(f"{name}: head size must be one of {HEAD_SIZES} and T >= 1, not N = {N}, T = {T}")
    if r.dtype not in DTYPES or any(x.dtype != r.dtype for x in steps):
        dtypes = ", ".join(str(x.dtype) for x in steps)
        raise ValueError(f"{name}: {names} must share one dtype of fp32, bf16, fp16, not {dtypes}")
    for head, x in zip(operator.heads, heads, strict=True):
        if x.shape != (H, N):
            raise ValueError(f"{name}: {head} must be (H, N) = {(H, N)}, not {tuple(x.shape)}")
    if state.shape not in ((H, N, N), (B, H, N, N)):
        raise ValueError(f"{name}: state must be {(H, N, N)} or {(B, H, N, N)}, not {tuple(state.shape)}")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"{name}: lengths must be {(B,)}, not {tuple(lengths.shape)}")


# The operators as torch knows them. `save_states` makes the forward pass leave what the backward pass starts from.

_OPERATORS = {operator.name: operator for operator in (WKV6, WKV7)}
_library = torch.library.Library("rwkv_speech", "DEF")


def _register(operator: Operator) -> None:
    name, n_steps, n_inputs = f"rwkv_speech::{operator.name}", len(operator.steps), len(operator.inputs)
    tensors = ", ".join(f"Tensor {x}" for x in operator.inputs)
    _library.define(
        f"{operator.name}({tensors}, Tensor state, Tensor? lengths, bool save_states) -> (Tensor, Tensor, Tensor)"
    )
    gradients = ", ".join(["Tensor"] * (n_inputs + 1))
    _library.define(
        f"{operator.name}_backward({tensors}, Tensor chunk_states, Tensor? lengths, Tensor gy, Tensor g_final)"
        f" -> ({gradients})"
    )

    def forward(r: Tensor, *args: object) -> tuple[Tensor, ...]:
        return backend(r.device.type, operator).forward(r, *args)

    def backward(r: Tensor, *args: object) -> tuple[Tensor, ...]:
        return backend(r.device.type, operator).backward(r, *args)

    for key in ("CPU", "CUDA"):
        _library.impl(operator.name, forward, key)
        _library.impl(f"{operator.name}_backward", backward, key)

    @torch.library.register_fake(name, lib=_library)
    def _(r, *args):
        state, _, save_states = args[-3:]
        B, T, H, N = r.shape
        chunk = backend(r.device.type, operator).chunk
        final_state = state.new_empty(B, H, N, N)
        saved = state.new_empty(B if save_states else 0, H, (T + chunk - 1) // chunk, N, N)
        return torch.empty_like(r), final_state, saved

    @torch.library.register_fake(f"{name}_backward", lib=_library)
    def _(*args):
        r, g_final = args[0], args[-1]
        B, _, H, N = r.shape
        heads = (x.new_empty(B, H, N) for x in args[n_steps:n_inputs])
        return (*(torch.empty_like(x) for x in args[:n_steps]), *heads, torch.empty_like(g_final))

    def save(ctx, inputs, output) -> None:
        *tensors, state, lengths, _ = inputs
        ctx.shared_state = state.dim() == 3
        ctx.save_for_backward(*tensors, output[2], lengths)

    def gradients_of(ctx, gy, g_final, _):
        *tensors, chunk_states, lengths = ctx.saved_tensors
        if chunk_states.shape[0] == 0:
            raise RuntimeError(f"{operator.name} was run without save_states and has no gradient")
        operator_backward = getattr(torch.ops.rwkv_speech, f"{operator.name}_backward")
        gradients = operator_backward(*tensors, chunk_states, lengths, gy.contiguous(), g_final.contiguous())
        *steps, g_state = (*gradients[:n_steps], *(g.sum(0) for g in gradients[n_steps:-1]), gradients[-1])
        return *steps, g_state.sum(0) if ctx.shared_state else g_state, None, None

    torch.library.register_autograd(name, gradients_of, setup_context=save, lib=_library)


for _operator in _OPERATORS.values():
    _register(_operator)
