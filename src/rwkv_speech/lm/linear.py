"""The product with a frozen weight matrix, for many rows and for the few of a decoding step."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_speech.lm import wkv

# Up to so many rows our kernel, which reads the weights once, beats torch's on the CPU; measured by bench/decode.py.
FEW_ROWS = 16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K), weight (O, K), both on one device -> x @ weight.T, (..., O)."""
    if few(x, x.shape[-1], weight):
        return torch.ops.rwkv_speech_cpu.few_rows_linear(x, weight)
    return F.linear(x, weight)


def bmm(x: Tensor, matrix: Tensor) -> Tensor:
    """x (G, R, K), matrix (G, K, O) -> (G, R, O)."""
    if few(x, x.shape[0] * x.shape[2], matrix):
        return torch.ops.rwkv_speech_cpu.few_rows_matmul(x, matrix)
    return torch.bmm(x, matrix)


def low_rank(x: Tensor, first: Tensor, second: Tensor, between: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """between(x @ first) @ second for x (B, T, C), first (C, D), second (D, O) -> (B, T, O)."""
    product = torch.ops.rwkv_speech_cpu.few_rows_matmul if few(x, x.shape[-1], first, second) else torch.bmm
    low = product(x.reshape(1, -1, x.shape[-1]), first[None])
    return product(between(low) if between else low, second[None]).view(*x.shape[:-1], -1)


def few(x: Tensor, row: int, *weights: Tensor, most: int = FEW_ROWS) -> bool:
    """Whether our kernel, which has no backward pass, takes x: at most so many rows of so many numbers."""
    if torch.compiler.is_compiling():  # before it asks for sizes, which would bind what is compiled to these
        return False
    small = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() <= most * row
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    return small and not learning and wkv.backend("cpu").name == "cpu"


class Linear(nn.Linear):
    """A matrix without bias, as RWKV has them; the input is (..., in_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
