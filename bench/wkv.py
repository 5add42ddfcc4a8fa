"""The WKV operators against a plain torch loop, against each other, and their share of a layer. A JSON line for each.

python bench/wkv.py
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.timing import seconds
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.rwkv6 import RWKV6
from rwkv_speech.lm.rwkv7 import RWKV7
from rwkv_speech.lm.wkv import wkv6, wkv7

B, T, H, N = 4, 256, 32, 64


def loop6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as its formula reads, in torch, left to autograd."""
    r, k, v, w = (x.float() for x in (r, k, v, w))
    S, decay, y = S.expand(r.shape[0], *S.shape[-3:]), torch.exp(-torch.exp(w)), []
    for t in range(r.shape[1]):
        kv = v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append(((S + u[:, None] * kv) * r[:, t, :, None, :]).sum(-1))
        S = decay[:, t, :, None, :] * S + kv
    return torch.stack(y, 1), S


def loop7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The same for RWKV-7."""
    r, w, k, v, a, b = (x.float() for x in (r, w, k, v, a, b))
    S, decay, y = S.expand(r.shape[0], *S.shape[-3:]), torch.exp(-math.exp(-0.5) * torch.sigmoid(w)), []
    for t in range(r.shape[1]):
        removed = (S * a[:, t, :, None, :]).sum(-1, keepdim=True)
        S = decay[:, t, :, None, :] * S + removed * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append((S * r[:, t, :, None, :]).sum(-1))
    return torch.stack(y, 1), S


def inputs_of(generation: int) -> list[Tensor]:
    r, k, v, a, gate = (torch.randn(B, T, H, N) for _ in range(5))
    w, state = torch.rand(B, T, H, N) * 8 - 6, torch.randn(H, N, N)
    if generation == 6:
        return [r, k, v, w, torch.randn(H, N), state]
    a = torch.nn.functional.normalize(a, dim=-1)
    return [r, w, k, v, -a, a * torch.sigmoid(gate), state]


def train(operator, leaves: list[Tensor], gy: Tensor) -> tuple[Tensor, ...]:
    y, S = operator(*leaves)
    return torch.autograd.grad((y * gy).sum() + S.sum(), leaves)


def train_layer(model, x: Tensor) -> tuple[Tensor, ...]:
    """One step of the second layer of two, frozen but for its initial state, between others that want gradients."""
    layer, state, zero = model.blocks[1], model.time_states[1], torch.zeros(B, H * N)
    y, _, after = layer(x, x.detach().view(B, T, -1), state, zero, zero, None)
    return torch.autograd.grad(y.sum() + after.wkv.sum(), (x, state))


def main() -> None:
    torch.manual_seed(0)
    gy = torch.randn(B, T, H, N)
    generations = {6: (RWKV6, wkv6, loop6), 7: (RWKV7, wkv7, loop7)}
    things, layers = {}, {}
    for generation, (model_class, operator, loop) in generations.items():
        inputs = inputs_of(generation)
        leaves = [x.clone().requires_grad_() for x in inputs]
        got = [*operator(*inputs), *train(operator, leaves, gy)]
        for x, want in zip(got, [*loop(*inputs), *train(loop, leaves, gy)], strict=True):
            error = (x - want).norm() / want.norm()
            assert error < 1e-5, f"the operator of RWKV-{generation} is off by {error:.1e}"
        for name, how in (("ours", operator), ("loop", loop)):
            things[name, generation] = partial(how, *inputs)
            things[f"{name}_train", generation] = partial(train, how, leaves, gy)
        sizes = official_sizes(generation=generation, n_layer=2, n_embd=H * N, vocab_size=257)
        model = model_class.from_tensors(
            sizes, random_weights(sizes, seed=0, time_state=True), device="cpu", dtype=torch.float32
        )
        model.time_states[1].requires_grad_()
        layers["layer", generation] = partial(train_layer, model, torch.randn(B, T, H * N, requires_grad=True))
        layers["operator", generation] = partial(train, operator, leaves, gy)
    t = seconds(things, rounds=5)
    share = seconds(layers, rounds=5)
    for generation in generations:
        result = {
            "bench": f"wkv{generation}",
            "shape": f"B{B}-T{T}-H{H}-N{N} fp32",
            "threads": torch.get_num_threads(),
            "forward_speedup": round(t["loop", generation] / t["ours", generation], 1),
            "train_speedup": round(t["loop_train", generation] / t["ours_train", generation], 1),
            "share_of_layer": round(share["operator", generation] / share["layer", generation], 4),
        }
        if generation == 7:
            result["forward_time_of_rwkv6"] = round(t["ours", 7] / t["ours", 6], 2)
            result["train_time_of_rwkv6"] = round(t["ours_train", 7] / t["ours_train", 6], 2)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
