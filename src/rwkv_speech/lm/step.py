"""A block for one token of a few samples, as one call of C++: a decoding step on the CPU.

The formulas are those of `rwkv6` and `rwkv7`, which serve in all other cases and as the reference in the tests. What
they round to bf16 between their operations, this keeps in fp32.
"""

import functools
import re
from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn

from rwkv_speech.lm.linear import few
from rwkv_speech.lm.quantised import QuantisedLinear
from rwkv_speech.lm.state import LayerState

_NORM = ("{0}.weight", "{0}.bias")
# The weights of a block in the order in which `cuda/step_cpu.cpp` takes them.
_NAMES = {
    6: (
        *(name.format("ln1") for name in _NORM),
        *("att.time_maa_x", "att.time_maa_w1", "att.time_maa_w2"),
        *(f"att.time_maa_{part}" for part in "wkvrg"),
        *("att.time_decay", "att.time_decay_w1", "att.time_decay_w2"),
        *(f"att.{matrix}.weight" for matrix in ("receptance", "key", "value", "gate")),
        "att.time_faaaa",
        *(name.format("att.ln_x") for name in _NORM),
        "att.output.weight",
        *(name.format("ln2") for name in _NORM),
        *("ffn.time_maa_k", "ffn.time_maa_r", "ffn.key.weight", "ffn.receptance.weight", "ffn.value.weight"),
    ),
    7: (
        *(name.format("ln1") for name in _NORM),
        *(f"att.x_{part}" for part in "rwkvag"),
        *(f"att.{matrix}.weight" for matrix in ("receptance", "key", "value")),
        *(f"att.{name}" for name in ("w0", "w1", "w2", "a0", "a1", "a2", "g1", "g2", "k_k", "k_a", "r_k")),
        *("att.v0", "att.v1", "att.v2"),
        *(name.format("att.ln_x") for name in _NORM),
        "att.output.weight",
        *(name.format("ln2") for name in _NORM),
        *("ffn.x_k", "ffn.key.weight", "ffn.value.weight"),
    ),
}
_MATRIX = re.compile(r"(.*(?:receptance|key|value|gate|output))\.weight")


@functools.cache
def _weights(generation: int, *, first: bool, packed: bool) -> Callable[[nn.Module], tuple[Tensor, ...]]:
    """Gives the weights of a block.

    first: whether it is the first one, which in RWKV-7 has no values of an earlier one.
    """
    names = [name for name in _NAMES[generation] if not (first and name in ("att.v0", "att.v1", "att.v2"))]
    if packed:
        found = [(name, _MATRIX.fullmatch(name)) for name in names]
        names = [own for name, m in found for own in ((f"{m[1]}.packed", f"{m[1]}.scale") if m else (name,))]
    return attrgetter(*names)


def takes(x: Tensor, wkv: Tensor, weight: Tensor) -> bool:
    """Whether `step` serves for x (B, T, C), a state, and weights of such a type."""
    if x.shape[1] != 1 or weight.dtype != x.dtype:  # of a model in fp16, x is in fp32
        return False
    return few(x, x.shape[-1]) and not (torch.is_grad_enabled() and wkv.requires_grad)


def step(
    block: nn.Module, generation: int, x: Tensor, v_first: Tensor | None, state: LayerState
) -> tuple[Tensor, Tensor | None, LayerState]:
    """`Block.forward` for x (B, 1, C)."""
    wkv, att_shift, ffn_shift = state
    packed = isinstance(block.att.key, QuantisedLinear)
    weights = list(_weights(generation, first=v_first is None, packed=packed)(block))
    if generation == 6:
        x, att_shift, ffn_shift, wkv = torch.ops.rwkv_speech_cpu.rwkv6_step(x[:, 0], att_shift, ffn_shift, wkv, weights)
    else:
        x, v_first, att_shift, ffn_shift, wkv = torch.ops.rwkv_speech_cpu.rwkv7_step(
            x[:, 0], v_first, att_shift, ffn_shift, wkv, weights
        )
    return x[:, None], v_first, LayerState(wkv, att_shift, ffn_shift)
