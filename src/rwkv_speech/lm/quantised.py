"""Frozen matrices of eight or four bits a weight: packing and unpacking them, and their product with vectors.

- int8: w = scale * q, q from -127 to 127; a row has one scale, its largest |w| / 127.
- nf4: w = scale * NF4[q], q from 0 to 15; each 64 weights of a row have one scale, their largest |w|. Two share a byte,
  the first in its upper half.

A product unpacks what it needs, part by part, and keeps only the packed form for its backward pass; that of a few rows
on the CPU reads the packed form itself (cuda/packed.h).

Source of nf4: Dettmers et al. 2023, "QLoRA" (arXiv:2305.14314), appendix E; codes and packing are bitsandbytes' own.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from rwkv_speech.lm.linear import Linear, few

# Quantiles of the normal distribution, scaled to -1..1; an asymmetric choice, so that 0 is one of them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64  # weights of a row to a scale of nf4
PACKED_AT_ONCE = 2**18  # weights: what packing them takes besides is small
UNPACKED_AT_ONCE = 2**22  # weights: they take 32 MB on their way
FEW_ROWS = 32  # up to which reading a matrix packed takes less time than unpacking it


def quantise(weight: Tensor, quant: str, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """weight (O, K) of any floating type -> what stands for it: packed, and its scales (fp32), on a device.

    quant: int8: packed (O, K) int8, scales (O,); nf4: packed (O, 32 * blocks) uint8, scales (O, blocks), where the last
        block of a row is filled with zeros.
    """
    pack = {"int8": _pack_int8, "nf4": _pack_nf4}[quant]
    shapes = _shapes(*weight.shape, quant)
    packed, scale = (torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes)
    for rows in _parts(*weight.shape, PACKED_AT_ONCE):
        packed[rows], scale[rows] = pack(weight[rows].to(packed.device).float())
    return packed, scale


def dequantise(packed: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights (O, in_features) that `quantise` has kept; they are fp32 numbers, rounded to `dtype` at the end."""
    if packed.dtype == torch.int8:
        return packed.float().mul_(scale[:, None]).to(dtype)
    pairs = F.embedding(packed.int(), _pairs(packed.device))  # (O, bytes, 2)
    weight = pairs.view(*scale.shape, BLOCK).mul_(scale[..., None])
    return weight.view(len(packed), -1)[:, :in_features].to(dtype)


def _shapes(rows: int, columns: int, quant: str) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and type of `quantise`'s results."""
    if quant == "int8":
        return ((rows, columns), torch.int8), ((rows,), torch.float32)
    blocks = -(-columns // BLOCK)
    return ((rows, blocks * BLOCK // 2), torch.uint8), ((rows, blocks), torch.float32)


def _pack_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(1)
    scale = largest / largest.new_tensor(127.0)  # by a Python number a GPU multiplies by 1 / 127, which rounds twice
    return (x / _divisor(scale)[:, None]).round_().to(torch.int8), scale


def _pack_nf4(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = F.pad(x, (0, -x.shape[1] % BLOCK)).view(len(x), -1, BLOCK)
    scale = blocks.abs().amax(2)
    codes = torch.tensor(NF4, device=x.device)
    between = (codes[:-1] + codes[1:]) / 2
    nearest = torch.bucketize(blocks / _divisor(scale)[..., None], between, out_int32=True).to(torch.uint8)
    first, second = nearest.view(len(x), -1, 2).unbind(2)
    return first << 4 | second, scale


def _divisor(scale: Tensor) -> Tensor:
    """1 where all weights are 0."""
    return torch.where(scale == 0, 1, scale)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """(256, 2): the two codes of each byte."""
    with torch.inference_mode(False):
        codes = torch.tensor(NF4, device=device)
        return torch.cartesian_prod(codes, codes)


def _parts(rows: int, columns: int, most: int) -> Iterator[slice]:
    """Rows in parts of at most so many numbers, or single rows."""
    step = max(1, most // columns)
    return (slice(at, at + step) for at in range(0, rows, step))


class _Product(torch.autograd.Function):
    """x (..., K) -> (..., O). The gradient is that of x: the weights are frozen."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.in_features = K = x.shape[-1]
        parts = _parts(len(packed), K, UNPACKED_AT_ONCE)
        return torch.cat([F.linear(x, dequantise(packed[rows], scale[rows], K, x.dtype)) for rows in parts], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        packed, scale = ctx.saved_tensors
        K = ctx.in_features
        parts = _parts(len(packed), K, UNPACKED_AT_ONCE)
        products = ((grad[..., rows] @ dequantise(packed[rows], scale[rows], K, grad.dtype)).float() for rows in parts)
        # Not sum(), which would begin with 0 + the first.
        return functools.reduce(torch.add, products).to(grad.dtype), None, None


class QuantisedLinear(Linear):
    """`Linear` with a packed weight.

    quant: "int8" or "nf4".
    packed, scale: as `quantise` gives them. Parameters like other frozen weights, which buffers that processes keep
        sending each other would not be.
    """

    def __init__(self, in_features: int, out_features: int, quant: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.quant = in_features, out_features, quant
        self.register_parameter("bias", None)
        for name, (shape, dtype) in zip(("packed", "scale"), _shapes(out_features, in_features, quant), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """(O, K) fp32, made anew each time."""
        return dequantise(self.packed, self.scale, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if few(x, self.in_features, most=FEW_ROWS):
            return torch.ops.rwkv_speech_cpu.few_rows_packed(x, self.packed, self.scale)
        return _Product.apply(x, self.packed, self.scale)


def quantise_layers(model: nn.Module, quant: str) -> dict[str, QuantisedLinear]:
    """Puts new quantised layers, still without weights, in the place of all `Linear`s of a language model.

    The head is int8 either way: of a small model it is a third of what a token reads, so that it can't stay as it is,
    and of a large one so little that four bits would save a few percent, while their errors go straight into logits.

    Returns:
        Them, by their names.
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    for name, layer in found.items():
        found[name] = QuantisedLinear(layer.in_features, layer.out_features, "int8" if name == "head" else quant)
        model.set_submodule(name, found[name])
    return found
