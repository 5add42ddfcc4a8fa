"""New RWKV-6 tensors in the official form: `fresh_weights` to train from, `random_weights` to test with."""

import math

import torch
from torch import Generator, Tensor

from rwkv_speech.lm.weights import ModelSizes, expected_shapes


def official_sizes(*, n_layer: int, n_embd: int, vocab_size: int = 65536, head_size: int = 64) -> ModelSizes:
    """The sizes that the official models of this depth and width have.

    The rule is that of BlinkDL/RWKV-LM, RWKV-v5 (x060): ffn width 3.5 C rounded down to a multiple of 32;
    ranks 32 and 64, and 64 and 128 from width 4096 on.
    """
    wide = n_embd >= 4096
    return ModelSizes(
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_embd // head_size,
        head_size=head_size,
        dim_ffn=int(n_embd * 3.5) // 32 * 32,
        dim_mix=64 if wide else 32,
        dim_decay=128 if wide else 64,
        vocab_size=vocab_size,
    )


def fresh_weights(sizes: ModelSizes, *, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """An untrained model, initialised as the official code does it.

    Source: BlinkDL/RWKV-LM, RWKV-v5/src/model.py, classes RWKV_Tmix_x060 and RWKV_CMix_x060 (ramps over the
    channels and the depth) and RWKV.generate_init_weight (matrices). Each block starts as the identity: the
    matrices that write to the residual stream are zero.

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

    Activations keep a healthy size (matrices have variance 1 / inputs), and the decays exp(-exp(w)) spread
    over (0, 1). Each tensor is drawn in `dtype` at once: a large model needs no fp32 copy.

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
        case "time_decay_w1" | "time_maa_w1":
            return normal(tensor.shape[0] ** -0.5)
        case "time_decay_w2" | "time_maa_w2":
            return normal(0.4 * tensor.shape[-2] ** -0.5)
        case "time_faaaa" | "time_state":
            return normal(1)
        case "bias":
            return normal(0.1)
        case "weight" if tensor.ndim == 1:  # norms
            return uniform(0.5, 1.5)
        case "weight":
            return normal(1 if name == "emb.weight" else tensor.shape[-1] ** -0.5)
        case _:  # token-shift weights
            return uniform(0.1, 0.9)
