"""The WKV operator against a plain torch loop, and its share of a layer. Prints one JSON line of ratios.

python bench/wkv.py
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.timing import seconds
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.rwkv6 import Block
from rwkv_speech.lm.wkv import wkv6

B, T, H, N = 4, 256, 32, 64


def loop(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as its formula reads, in torch, left to autograd."""
    S, decay, y = S.expand(B, H, N, N), torch.exp(-torch.exp(w)), []
    for t in range(r.shape[1]):
        kv = v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append(((S + u[:, None] * kv) * r[:, t, :, None, :]).sum(-1))
        S = decay[:, t, :, None, :] * S + kv
    return torch.stack(y, 1), S


def main() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(B, T, H, N) for _ in range(3)] + [torch.rand(B, T, H, N) * 8 - 6]
    inputs += [torch.randn(H, N), torch.randn(H, N, N)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    gy = torch.randn(B, T, H, N)

    def train(operator):
        y, S = operator(*leaves)
        return torch.autograd.grad((y * gy).sum() + S.sum(), leaves)

    for got, want in zip([*wkv6(*inputs), *train(wkv6)], [*loop(*inputs), *train(loop)], strict=True):
        error = (got - want).norm() / want.norm()
        assert error < 1e-5, f"the operator is off by {error:.1e}"
    t = seconds(
        {
            "ours": lambda: wkv6(*inputs),
            "loop": lambda: loop(*inputs),
            "ours_train": lambda: train(wkv6),
            "loop_train": lambda: train(loop),
        },
        rounds=5,
    )
    # One layer of the 1.6B model, frozen but for its initial state, between two that want gradients.
    sizes = official_sizes(n_layer=1, n_embd=H * N)
    tensors = {
        name.removeprefix("blocks.0."): x
        for name, x in random_weights(sizes, seed=0, time_state=True).items()
        if name.startswith("blocks.0.") and "ln0" not in name
    }
    layer = Block(sizes).requires_grad_(False)
    layer.load_state_dict(tensors)
    state = layer.att.time_state.requires_grad_()
    x, zero = torch.randn(B, T, H * N, requires_grad=True), torch.zeros(B, H * N)

    def train_layer():
        y, after = layer(x, state, zero, zero, None)
        return torch.autograd.grad(y.sum() + after.wkv.sum(), (x, state))

    share = seconds({"layer": train_layer, "operator": lambda: train(wkv6)}, rounds=5)
    result = {
        "bench": "wkv",
        "shape": f"B{B}-T{T}-H{H}-N{N} fp32",
        "threads": torch.get_num_threads(),
        "forward_speedup": round(t["loop"] / t["ours"], 1),
        "train_speedup": round(t["loop_train"] / t["ours_train"], 1),
        "share_of_layer": round(share["operator"] / share["layer"], 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
