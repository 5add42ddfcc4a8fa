"""The RWKV-6 ("x060", Finch) language model, frozen.

Notable:
- One code path for training, prefill and single tokens: vectors and a state in, vectors and the new state out.
- Logits are a call of their own, computed only at the positions that need them.
- Right-padded batches: with `lengths`, each sample gets the outputs and the final state that it gets alone.
- The five token-shift interpolations are one low-rank product, not five.
- Weights take no gradient; what can be trained is the initial state, `blocks[l].att.time_state`.

Formulas: Peng et al. 2024, "Eagle and Finch" (arXiv:2404.05892); tensor names: BlinkDL's released files.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_speech.lm.linear import Linear, bmm
from rwkv_speech.lm.state import LayerState, State
from rwkv_speech.lm.weights import ModelSizes, read_weights
from rwkv_speech.lm.wkv import wkv6

GROUP_NORM_EPS = 64e-5  # 1e-5 times the square of the head size divisor, 8, that the models were trained with


class TimeMix(nn.Module):
    """Attention's place: a linear recurrence over a matrix state for each head."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        C, H, N = sizes.n_embd, sizes.n_head, sizes.head_size
        self.n_head, self.head_size = H, N
        for name in "xwkvrg":
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * sizes.dim_mix))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, sizes.dim_mix, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, C))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, sizes.dim_decay))
        self.time_decay_w2 = nn.Parameter(torch.empty(sizes.dim_decay, C))
        self.time_faaaa = nn.Parameter(torch.empty(H, N))
        self.time_state = nn.Parameter(torch.empty(H, N, N))  # [value, key]
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.gate = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS)

    def forward(self, x: Tensor, before: Tensor, wkv: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), the vector before it (B, C), the state -> the layer's output (B, T, C) and the new state."""
        B, T, C = x.shape
        H, N = self.n_head, self.head_size
        change = shift(x, before) - x
        low = torch.tanh(bmm(torch.addcmul(x, change, self.time_maa_x).view(1, B * T, C), self.time_maa_w1[None]))
        low = low.view(B * T, 5, -1).transpose(0, 1)  # (5, BT, D)
        maa = torch.cat([self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g])
        mix = (maa + bmm(low, self.time_maa_w2)).view(5, B, T, C)
        x_w, x_k, x_v, x_r, x_g = torch.addcmul(x, change, mix)
        r, k, v = (m(z).view(B, T, H, N) for m, z in ((self.receptance, x_r), (self.key, x_k), (self.value, x_v)))
        low = torch.tanh(bmm(x_w.view(1, B * T, C), self.time_decay_w1[None]))
        w = (self.time_decay + bmm(low, self.time_decay_w2[None])).view(B, T, H, N)
        y, wkv = wkv6(r, k, v, w, self.time_faaaa, wkv, lengths)
        y = F.group_norm(y.view(B * T, C).float(), H, self.ln_x.weight.float(), self.ln_x.bias.float(), self.ln_x.eps)
        return self.output(y.to(x.dtype).view(B, T, C) * F.silu(self.gate(x_g))), wkv


class ChannelMix(nn.Module):
    """The feed-forward half of a block, with its own token shift."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        C = sizes.n_embd
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = Linear(C, sizes.dim_ffn)
        self.receptance = Linear(C, C)
        self.value = Linear(sizes.dim_ffn, C)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x (B, T, C), the vector before it (B, C) -> (B, T, C)."""
        change = shift(x, before) - x
        k = F.relu(self.key(torch.addcmul(x, change, self.time_maa_k)), inplace=True).square()
        return torch.sigmoid(self.receptance(torch.addcmul(x, change, self.time_maa_r))) * self.value(k)


class Block(nn.Module):
    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(sizes.n_embd)
        self.ln2 = nn.LayerNorm(sizes.n_embd)
        self.att = TimeMix(sizes)
        self.ffn = ChannelMix(sizes)

    def forward(
        self, x: Tensor, wkv: Tensor, att_shift: Tensor, ffn_shift: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        att_input = self.ln1(x)
        out, wkv = self.att(att_input, att_shift, wkv, lengths)
        x = x + out
        ffn_input = self.ln2(x)
        x = x + self.ffn(ffn_input, ffn_shift)
        return x, LayerState(wkv, last(att_input, lengths), last(ffn_input, lengths))


class RWKV6(nn.Module):
    """The language model: `forward` from tokens or embeddings to hidden vectors, `logits` from those to the vocabulary.

    Every weight is frozen. `checkpointing = True` trades the activations of a block for computing it again in the
    backward pass.
    """

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.checkpointing = False
        self.emb = nn.Embedding(sizes.vocab_size, sizes.n_embd)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.n_layer))
        self.blocks[0].ln0 = nn.LayerNorm(sizes.n_embd)
        self.ln_out = nn.LayerNorm(sizes.n_embd)
        self.head = Linear(sizes.n_embd, sizes.vocab_size)
        self.requires_grad_(False)

    @classmethod
    def from_file(
        cls, path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "RWKV6":
        """Reads a .pth or .safetensors file; weights stay in the mapped file where neither device nor dtype change.

        Args:
            path: an official RWKV-6 file, or one in its form; a `time_state` in it becomes the initial state.
            device: where the weights go.
            dtype: fp32, bf16 or fp16; None keeps that of the file's embedding.

        Raises:
            WeightsError: the file can't be read, or holds no complete RWKV-6.
        """
        sizes, tensors = read_weights(path)
        with torch.device("meta"):
            model = cls(sizes)
        dtype = dtype or tensors["emb.weight"].dtype
        for name, parameter in model.state_dict().items():
            if name.endswith("time_state"):
                state = tensors.get(name, torch.zeros(parameter.shape))
                tensors[name] = state.to(device, torch.float32)
            else:
                tensors[name] = tensors[name].to(device, dtype)
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.emb.weight.dtype

    def initial_state(self, batch_size: int) -> State:
        """The learned (or zero) initial state, shared by the batch; token shifts start from zero."""
        zero = self.emb.weight.new_zeros(batch_size, self.sizes.n_embd)
        return State(tuple(LayerState(block.att.time_state, zero, zero) for block in self.blocks))

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (...,) int64 -> their embeddings (..., C), as `forward` takes them."""
        return F.embedding(tokens, self.emb.weight)

    def forward(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Runs over T positions.

        Args:
            inputs: tokens (B, T) int64, or embeddings (B, T, C).
            state: what came before; None is the initial state.
            lengths: (B,) integers in 1..T, the positions of each sample; None: T for all.

        Returns:
            Hidden vectors (B, T, C), meaningless after each sample's length, and the state after its last position.
        """
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        x = self.blocks[0].ln0(x.to(self.dtype))
        state = state or self.initial_state(x.shape[0])
        after = []
        for block, before in zip(self.blocks, state.layers, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x, layer = checkpoint(block, x, *before, lengths, use_reentrant=False)
            else:
                x, layer = block(x, *before, lengths)
            after.append(layer)
        return x, State(tuple(after))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden vectors (..., C) -> logits (..., vocabulary) in the dtype of the weights."""
        return self.head(self.ln_out(hidden))


def shift(x: Tensor, before: Tensor) -> Tensor:
    """x (B, T, C) one step later: `before` (B, C) comes first, the last vector is dropped."""
    return torch.cat([before[:, None].to(x.dtype), x[:, :-1]], dim=1)


def last(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The vectors (B, C) at each sample's last position of x (B, T, C)."""
    if lengths is None:
        return x[:, -1].clone()  # a view would keep all of x for as long as the state is kept
    return x[torch.arange(x.shape[0], device=x.device), lengths.to(x.device) - 1]
