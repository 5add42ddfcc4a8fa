"""A WKV operator in plain torch, for machines without a compiler: a chunk of steps at a time as matrix products.

What both generations share: cutting time into chunks, lengths, and the way back from saved states. What a chunk
computes stands in `wkv6.py` and `wkv7.py`.
"""

from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Chunk(Protocol):
    """The steps of one chunk: made of inputs (B, H, C, N) and per-head inputs (H, N), all fp32."""

    STEPS: ClassVar[int]
    """C, the steps of every chunk but a last one."""

    def __init__(self, *inputs: Tensor) -> None: ...

    def forward(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """From the state (B, H, N, N) before the chunk: y (B, H, C, N), and the state after it."""

    def backward(self, S: Tensor, gy: Tensor, G: Tensor) -> tuple[Tensor, ...]:
        """From gy and the gradient G of the state after the chunk: those of the inputs in their order, and of S.

        Gradients of per-head inputs are (B, H, N), those of each sample.
        """


class Chunked:
    """The operator of one generation.

    Args:
        chunk: computes one chunk.
        steps: names of the inputs (B, T, H, N); all further ones are (H, N).
    """

    def __init__(self, chunk: type[Chunk], steps: tuple[str, ...]) -> None:
        self.chunk, self.n_steps = chunk, len(steps)
        # After a sample's length a decay of 1 (w = -inf) and k = b = 0 leave its state as it is, r = 0 its output zero.
        self.beyond = [-torch.inf if name == "w" else 0.0 for name in steps]

    def forward(self, *args: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(*inputs, state, lengths, save_states) -> y, the final state, the states before each chunk (none unsaved)."""
        *inputs, state, lengths, save_states = args
        like = inputs[0]
        B, T, H, N = like.shape
        C = self.chunk.STEPS
        S = state.expand(B, H, N, N)
        steps, heads = self._inputs(inputs, lengths)
        outputs, states = [], []
        for t in range(0, T, C):
            states.append(S)
            y, S = self.chunk(*(x[:, :, t : t + C] for x in steps), *heads).forward(S)
            outputs.append(y)
        saved = torch.stack(states, 2) if save_states else S.new_empty(0, H, len(states), N, N)
        return torch.cat(outputs, 2).transpose(1, 2).to(like.dtype, copy=True).contiguous(), S.contiguous(), saved

    def backward(self, *args: Tensor | None) -> tuple[Tensor, ...]:
        """(*inputs, chunk_states, lengths, gy, g_final) -> gradients of the inputs, and of the state per sample."""
        *inputs, chunk_states, lengths, gy, G = args
        steps, heads = self._inputs(inputs, lengths)
        gy = _steps(gy, lengths)
        parts = []
        for index in reversed(range(chunk_states.shape[2])):
            span = slice(index * self.chunk.STEPS, (index + 1) * self.chunk.STEPS)
            chunk = self.chunk(*(x[:, :, span] for x in steps), *heads)
            *part, G = chunk.backward(chunk_states[:, :, index], gy[:, :, span], G)
            parts.append(part)
        columns = list(zip(*parts, strict=True))
        g_steps = (torch.cat(x[::-1], 2).transpose(1, 2) for x in columns[: self.n_steps])
        g_steps = (_steps(g, lengths).transpose(1, 2).to(inputs[0].dtype).contiguous() for g in g_steps)
        return (*g_steps, *(sum(x) for x in columns[self.n_steps :]), G.contiguous())

    def _inputs(self, inputs: list[Tensor], lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        steps = [_steps(x, lengths, beyond) for x, beyond in zip(inputs, self.beyond, strict=False)]
        return steps, inputs[self.n_steps :]


def before(x: Tensor) -> Tensor:
    """Sums over the steps (dimension -2) before each step."""
    return torch.nn.functional.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def _steps(x: Tensor, lengths: Tensor | None, beyond: float = 0.0) -> Tensor:
    """(B, T, H, N) -> (B, H, T, N) in fp32, with the value `beyond` after each sample's own length."""
    x = x.float().transpose(1, 2)
    if lengths is None:
        return x
    valid = torch.arange(x.shape[2], device=x.device) < lengths[:, None]  # (B, T)
    return torch.where(valid[:, None, :, None], x, beyond)
