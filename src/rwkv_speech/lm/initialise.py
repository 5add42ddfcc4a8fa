"""New RWKV-6 and RWKV-7 tensors in the official form: `fresh_weights` to train from, `random_weights` to test with."""

import math

import torch
from torch import Generator, Tensor

from rwkv_speech.lm.weights import ModelSizes, expected_shapes

# Ranks of decay, learning rate, value and gate in the released RWKV-7 models of a width.
_RANKS7 = {
    768: (64, 64, 32, 128),
    1024: (64, 64, 32, 128),
    2048: (96, 96, 64, 256),
    2560: (96, 96, 64, 320),
    4096: (128, 128, 96, 480),
}


def official_sizes(
    *, generation: int = 6, n_layer: int, n_embd: int, vocab_size: int = 65536, head_size: int = 64
) -> ModelSizes:
    """The sizes that the official models of this depth and width have.

    RWKV-6: the rule of BlinkDL/RWKV-LM, RWKV-v5 (x060): ffn width 3.5 C rounded down to a multiple of 32; ranks 32 and
    64, and 64 and 128 from width 4096 on. RWKV-7: ffn width 4 C; the ranks of the released models, and for other widths
    those that RWKV-v7/train_temp/src/model.py suggests.
    """
    common = {
        "generation": generation,
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_embd // head_size,
        "head_size": head_size,
        "vocab_size": vocab_size,
    }
    if generation == 6:
        wide = n_embd >= 4096
        return ModelSizes(
            **common, dim_ffn=int(n_embd * 3.5) // 32 * 32, dim_mix=64 if wide else 32, dim_decay=128 if wide else 64
        )
    suggested = tuple(max(32, round(factor * n_embd**0.5 / 32) * 32) for factor in (2.5, 2.5, 1.7, 5))
    w, a, v, g = (192, 192, 128, 384) if (n_layer, n_embd) == (61, 4096) else _RANKS7.get(n_embd, suggested)
    v = v if n_layer > 1 else 0
    return ModelSizes(**common, dim_ffn=4 * n_embd, dim_decay=w, dim_rate=a, dim_value=v, dim_gate=g)


def fresh_weights(sizes: ModelSizes, *, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """An untrained model, initialised as the official code does it.

    Source: BlinkDL/RWKV-LM, RWKV-v5/src/model.py, classes RWKV_Tmix_x060 and RWKV_CMix_x060, and
    RWKV-v7/train_temp/src/model.py, classes RWKV_Tmix_x070 and RWKV_CMix_x070 (ramps over the channels and the depth),
    each with RWKV.generate_init_weight (matrices). Each block starts as the identity: the matrices that write to the
    residual stream are zero.

    Args:
        sizes: of the model.
        seed: of all random numbers; same seed, same weights.
        dtype: of the result.

    Returns:
        A tensor of each name and shape of `expected_shapes`.
    """
    generator = Generator().manual_seed(seed)
    shapes = expected_shapes(sizes)
    return {name: _fresh(name, shape, sizes, generator).to(dtype) for name, shape in shapes.items()}


def random_weights(
    sizes: ModelSizes, *, seed: int, dtype: torch.dtype = torch.float32, time_state: bool = False
) -> dict[str, Tensor]:
    """A model for tests and benchmarks: every tensor is random and takes part in the result.

    Activations keep a healthy size (matrices have variance 1 / inputs), and the decays spread over all that there
    are. Each tensor is drawn in `dtype` at once: a large model needs no fp32 copy.

    Args:
        sizes: of the model.
        seed: of all random numbers; same seed and dtype, same weights.
        dtype: of the result.
        time_state: with a non-zero initial state in each block.

    Returns:
        A tensor of each name and shape of `expected_shapes`.
    """
    generator = Generator().manual_seed(seed)
    shapes = expected_shapes(sizes, time_state=time_state)
    return {name: _random(name, torch.empty(shape, dtype=dtype), generator) for name, shape in shapes.items()}


def _fresh(name: str, shape: tuple[int, ...], sizes: ModelSizes, generator: Generator) -> Tensor:
    C, V, L = sizes.n_embd, sizes.vocab_size, sizes.n_layer
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
    depth = layer / max(L - 1, 1)  # 0 in the first block, 1 in the last
    rest = 1 - layer / L  # 1 in the first block, 1/L in the last
    ramp = torch.arange(C) / C  # 0 to almost 1 over the channels
    closed_ramp = torch.arange(C) / max(C - 1, 1)  # 0 to 1
    in_head = torch.linspace(-1, 1, sizes.head_size).repeat(sizes.n_head)
    in_head = in_head * in_head.abs()  # -1 to 1 over each head's channels

    match name.removeprefix(f"blocks.{layer}."):
        case "att.time_maa_x" | "att.time_maa_w" | "att.time_maa_k" | "ffn.time_maa_k" | "ffn.time_maa_r":
            value = 1 - ramp**rest
        case "att.time_maa_v":
            value = 1 - (ramp**rest + 0.3 * depth)
        case "att.time_maa_r" | "att.time_maa_g":
            value = 1 - ramp ** (0.5 * rest)
        case "att.time_decay":
            value = -6 + 5 * closed_ramp ** (0.7 + 1.3 * depth)
        case "att.time_faaaa":
            zigzag = ((torch.arange(C) + 1) % 3 - 1) * 0.1
            value = depth * (1 - closed_ramp) + zigzag
        case "att.x_r" | "att.x_g":
            value = 1 - ramp ** (0.2 * rest)
        case "att.x_w" | "att.x_a":
            value = 1 - ramp ** (0.9 * rest)
        case "att.x_k" | "att.x_v":
            value = 1 - ramp ** (0.7 * rest)
        case "ffn.x_k":
            value = 1 - ramp**rest**4
        case "att.w0":
            value = -5.5 + 6 * closed_ramp ** (1 + depth**0.3) + 2.5 * in_head
        case "att.a0":
            value = -0.19 + 0.3 * in_head + 0.4 * (closed_ramp - 0.5)
        case "att.v0":
            value = 0.73 - 0.4 * (closed_ramp - 0.5)
        case "att.k_k":
            value = 0.71 - 0.1 * (closed_ramp - 0.5)
        case "att.k_a":
            value = torch.full(shape, 1.02)
        case "att.r_k":
            value = torch.full(shape, -0.04)
        case "att.w2" | "att.a2" | "att.v2" | "att.g2":
            value = _orthogonal(shape, 0.1 * math.sqrt(max(shape[0] / shape[1], 1)), generator)
        case "att.time_maa_w2" | "att.time_decay_w2":
            value = torch.empty(shape).uniform_(-0.01, 0.01, generator=generator)
        case "emb.weight":
            value = torch.empty(shape).uniform_(-1e-4, 1e-4, generator=generator)
        case "head.weight":
            value = _orthogonal(shape, 0.5 * math.sqrt(max(V / C, 1)), generator)
        case "att.key.weight" | "att.gate.weight":
            value = _orthogonal(shape, 0.1, generator)
        case "att.receptance.weight" | "att.value.weight" | "ffn.key.weight":
            value = _orthogonal(shape, 1, generator)
        case "att.ln_x.weight":
            value = torch.full(shape, ((1 + layer) / L) ** 0.7)
        case "ln0.weight" | "ln1.weight" | "ln2.weight" | "ln_out.weight":
            value = torch.ones(shape)
        case _:  # biases, the first halves of the low-rank products, what writes to the residual stream, ffn gate
            value = torch.zeros(shape)
    return value.reshape(shape)


def _orthogonal(shape: tuple[int, ...], gain: float, generator: Generator) -> Tensor:
    return torch.nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=generator)


def _random(name: str, tensor: Tensor, generator: Generator) -> Tensor:
    def normal(std: float) -> Tensor:
        return tensor.normal_(0, std, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return tensor.uniform_(low, high, generator=generator)

    match name.split(".")[-1]:
        case "time_decay":
            return uniform(-7, 1.5)  # decays 0.999 to 0.011
        case "w0":
            return uniform(-8, 4)  # decays 0.9998 to 0.55
        case "time_decay_w1" | "time_maa_w1" | "w1" | "a1" | "v1" | "g1":
            return normal(tensor.shape[0] ** -0.5)
        case "time_decay_w2" | "time_maa_w2" | "w2" | "a2" | "v2":
            return normal(0.4 * tensor.shape[-2] ** -0.5)
        case "g2":  # of gates of variance 1
            return normal(2 * tensor.shape[0] ** -0.5)
        case "time_faaaa" | "time_state" | "a0" | "v0":
            return normal(1)
        case "r_k":
            return normal(tensor.shape[1] ** -0.5)
        case "k_k" | "k_a":
            return uniform(0.5, 1.5)
        case "bias":
            return normal(0.1)
        case "weight" if tensor.ndim == 1:  # norms
            return uniform(0.5, 1.5)
        case "weight":
            return normal(1 if name == "emb.weight" else tensor.shape[-1] ** -0.5)
        case _:  # token-shift weights
            return uniform(0.1, 0.9)
