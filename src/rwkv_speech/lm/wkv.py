"""The WKV operator of RWKV-6: one function, three ways to compute it.

- `cuda`: the kernels of `cuda/wkv6.cu`, on NVIDIA GPUs.
- `cpu`: `cuda/wkv6_cpu.cpp`, vectorised and parallel over batch and heads.
- `torch`: chunks of matrix products, anywhere, for want of a compiler.

All three are held against the fp64 loops of `wkv_reference.py`. The operator is a torch custom operator with fake and
autograd rules, so it can be compiled, checkpointed and traced.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.lm import extension
from rwkv_speech.lm.wkv6 import CHUNK, wkv6_chunked_backward, wkv6_chunked_forward

log = logging.getLogger("rwkv_speech")

HEAD_SIZES = (32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "cuda", "cpu", "torch")


@dataclass(frozen=True)
class Backend:
    """One way to compute the operator.

    `forward(r, k, v, w, u, state, lengths, save_states)` gives y, the final state, and the state before every
    `chunk`-th step; `backward(r, k, v, w, u, chunk_states, lengths, gy, g_final)` gives the gradients of r, k, v, w,
    and those of u and the state for each sample.
    """

    name: str
    chunk: int
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


_requested = "auto"


def set_backend(name: str) -> None:
    """Chooses how the operator is computed from now on: `auto` (the best there is for each device), or one by name.

    Raises:
        ValueError: not one of BACKENDS.
    """
    global _requested
    if name not in BACKENDS:
        raise ValueError(f"no WKV backend {name!r}; there are {', '.join(BACKENDS)}")
    _requested = name


def backend(device_type: str) -> Backend:
    """The backend for tensors on this type of device; what was chosen is said once in the log.

    Raises:
        UserError: a backend was asked for by name that does not work here.
    """
    return _choose(device_type, _requested)


@functools.cache
def _choose(device_type: str, requested: str) -> Backend:
    name = requested
    if requested == "auto":
        name = device_type if device_type in ("cpu", "cuda") else "torch"
    elif requested in ("cpu", "cuda") and requested != device_type:
        raise UserError(f"--wkv {requested} does not compute on a {device_type} device: use auto or torch")
    try:
        chosen = _load(name)
    except extension.BuildError as error:
        if requested != "auto":
            raise UserError(f"--wkv {requested} cannot be built: {error}") from error
        log.warning("the WKV operator falls back to plain torch, which is slower: %s", error)
        chosen = _load("torch")
    log.info("WKV operator on %s: %s", device_type, chosen.name)
    return chosen


def _load(name: str) -> Backend:
    if name == "cpu":
        extension.load_cpu()
        ops = torch.ops.rwkv_speech_cpu
        return Backend("cpu", 32, ops.wkv6_forward, ops.wkv6_backward)
    if name == "cuda":
        extension.load_cuda()
        ops = torch.ops.rwkv_speech_cuda
        return Backend("cuda", 24, ops.wkv6_forward, ops.wkv6_backward)
    return Backend("torch", CHUNK, wkv6_chunked_forward, wkv6_chunked_backward)


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
    _check(r, k, v, w, u, state, lengths)
    r, k, v, w = (x.contiguous() for x in (r, k, v, w))
    u, state = u.float().contiguous(), state.float().contiguous()
    if lengths is not None:
        lengths = lengths.to(device=r.device, dtype=torch.int64)
    inputs = (r, k, v, w, u, state)
    train = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, final_state, _ = torch.ops.rwkv_speech.wkv6(*inputs, lengths, train)
    return y, final_state


def _check(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None) -> None:
    if r.dim() != 4 or any(x.shape != r.shape for x in (k, v, w)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (r, k, v, w))
        raise ValueError(f"wkv6: r, k, v, w must have one shape (B, T, H, N), not {shapes}")
    B, T, H, N = r.shape
    if N not in HEAD_SIZES or T < 1:
        raise ValueError(f"wkv6: head size must be one of {HEAD_SIZES} and T >= 1, not N = {N}, T = {T}")
    if r.dtype not in DTYPES or any(x.dtype != r.dtype for x in (k, v, w)):
        dtypes = ", ".join(str(x.dtype) for x in (r, k, v, w))
        raise ValueError(f"wkv6: r, k, v, w must share one dtype of fp32, bf16, fp16, not {dtypes}")
    if u.shape != (H, N):
        raise ValueError(f"wkv6: u must be (H, N) = {(H, N)}, not {tuple(u.shape)}")
    if state.shape not in ((H, N, N), (B, H, N, N)):
        raise ValueError(f"wkv6: state must be {(H, N, N)} or {(B, H, N, N)}, not {tuple(state.shape)}")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"wkv6: lengths must be {(B,)}, not {tuple(lengths.shape)}")


# The operator as torch knows it. `save_states` makes the forward pass leave what the backward pass starts from.

_library = torch.library.Library("rwkv_speech", "DEF")
_library.define(
    "wkv6(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor? lengths, bool save_states)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "wkv6_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor chunk_states, Tensor? lengths, Tensor gy,"
    " Tensor g_final) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(r: Tensor, *args: object) -> tuple[Tensor, ...]:
    return backend(r.device.type).forward(r, *args)


def _backward(r: Tensor, *args: object) -> tuple[Tensor, ...]:
    return backend(r.device.type).backward(r, *args)


for _key in ("CPU", "CUDA"):
    _library.impl("wkv6", _forward, _key)
    _library.impl("wkv6_backward", _backward, _key)


@torch.library.register_fake("rwkv_speech::wkv6", lib=_library)
def _(r, k, v, w, u, state, lengths, save_states):
    B, T, H, N = r.shape
    chunk = backend(r.device.type).chunk
    final_state = state.new_empty(B, H, N, N)
    saved = state.new_empty(B if save_states else 0, H, (T + chunk - 1) // chunk, N, N)
    return torch.empty_like(r), final_state, saved


@torch.library.register_fake("rwkv_speech::wkv6_backward", lib=_library)
def _(r, k, v, w, u, chunk_states, lengths, gy, g_final):
    B, _, H, N = r.shape
    return (*(torch.empty_like(x) for x in (r, k, v, w)), u.new_empty(B, H, N), torch.empty_like(g_final))


def _save(ctx, inputs, output) -> None:
    r, k, v, w, u, state, lengths, _ = inputs
    ctx.shared_state = state.dim() == 3
    ctx.save_for_backward(r, k, v, w, u, lengths, output[2])


def _gradients(ctx, gy, g_final, _):
    r, k, v, w, u, lengths, chunk_states = ctx.saved_tensors
    if chunk_states.shape[0] == 0:
        raise RuntimeError("wkv6 was run without save_states and has no gradient")
    gr, gk, gv, gw, gu, g_state = torch.ops.rwkv_speech.wkv6_backward(
        r, k, v, w, u, chunk_states, lengths, gy.contiguous(), g_final.contiguous()
    )
    return gr, gk, gv, gw, gu.sum(0), g_state.sum(0) if ctx.shared_state else g_state, None, None


torch.library.register_autograd("rwkv_speech::wkv6", _gradients, setup_context=_save, lib=_library)
