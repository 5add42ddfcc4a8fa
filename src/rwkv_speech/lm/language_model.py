"""What both generations of the language model share: reading files, embeddings, the pass through the blocks, logits.

Notable:
- One code path for training, prefill and single tokens: vectors and a state in, vectors and the new state out.
- Logits are a call of their own, computed only at the positions that need them.
- Right-padded batches: with `lengths`, each sample gets the outputs and the final state that it gets alone.
- fp16 keeps its range: the residual stream is fp32 then, and what is added to it is computed scaled down.
- Weights take no gradient; what can be trained is the initial state, `blocks[l].att.time_state`, of which there can be
  several: then each sample of a batch starts from one of them.

A generation is a subclass, with its time mix and channel mix.
"""

import functools
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_speech.lm import graphs, peft, step
from rwkv_speech.lm.linear import Linear
from rwkv_speech.lm.quantised import quantise, quantise_layers
from rwkv_speech.lm.state import LayerState, State
from rwkv_speech.lm.weights import ModelSizes
from rwkv_speech.options import QUANTS
from rwkv_speech.tensors import WeightsError

GROUP_NORM_EPS = 64e-5  # 1e-5 times the square of the head size divisor, 8, that the models were trained with


# Trained models have channels in which the residual stream, and what a layer adds to it, leave the range of fp16.
# (The rwkv package halves the stream every six layers instead, and the weights that lead to it as often.)
FP16_SCALE = 2.0**-6


class LayerNorm(nn.LayerNorm):
    """Of x in the dtype of the weights, or in fp32; the result is in that of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


def scaled(x: Tensor) -> Tensor:
    """x times FP16_SCALE if it is fp16, to be multiplied by a matrix that leads to the residual stream."""
    return x * FP16_SCALE if x.dtype == torch.float16 else x


def scaled_square_of_relu(x: Tensor) -> Tensor:
    """`scaled` of relu(x)^2, which would overflow from 256 on. May change x."""
    x = F.relu(x, inplace=True)
    return (x * FP16_SCALE**0.5 if x.dtype == torch.float16 else x).square()


def _add(x: Tensor, out: Tensor) -> Tensor:
    """The residual stream x with a layer's output, scaled as above."""
    return torch.add(x, out, alpha=1 / FP16_SCALE) if out.dtype == torch.float16 else x + out


class Block(nn.Module):
    """Time mix and channel mix, each normed and added to the residual stream."""

    def __init__(self, sizes: ModelSizes, att: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.generation = sizes.generation
        self.ln1 = LayerNorm(sizes.n_embd)
        self.ln2 = LayerNorm(sizes.n_embd)
        self.att = att
        self.ffn = ffn
        self.whole_step = True  # one token may be one call

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        wkv: Tensor,
        att_shift: Tensor,
        ffn_shift: Tensor,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """x (B, T, C), what the first layer hands to all others, and the state -> the same after the block."""
        if self.whole_step and lengths is None and step.takes(x, wkv, self.ln1.weight):
            return step.step(self, self.generation, x, v_first, LayerState(wkv, att_shift, ffn_shift))
        att_input = self.ln1(x)
        out, v_first, wkv = self.att(att_input, v_first, att_shift, wkv, lengths)
        x = _add(x, out)
        ffn_input = self.ln2(x)
        x = _add(x, self.ffn(ffn_input, ffn_shift))
        return x, v_first, LayerState(wkv, last(att_input, lengths), last(ffn_input, lengths))


class LanguageModel(nn.Module):
    """A frozen RWKV: `forward` from tokens or embeddings to hidden vectors, `logits` from those to the vocabulary.

    `checkpointing = True` trades the activations of a block for computing it again in the backward pass.
    quant: how the large matrices are kept: "int8", "nf4" (see `quantised`), or None.
    peft: what else was put beside them to be trained (see `peft`), or None.
    """

    generation: ClassVar[int]
    time_mix: ClassVar[type[nn.Module]]
    """(sizes, layer); `forward(x, v_first, before, wkv, lengths)` gives the output (`scaled`), v_first, new state."""
    channel_mix: ClassVar[type[nn.Module]]
    """(sizes); `forward(x, before)` gives the output, `scaled`."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.source = "the language model"  # where its weights come from
        self.checkpointing = False
        self._block = Block.__call__  # how a block is called where gradients are wanted
        self.quant: str | None = None
        self.peft: peft.Injected | None = None
        self.emb = nn.Embedding(sizes.vocab_size, sizes.n_embd)
        self.blocks = nn.ModuleList(
            Block(sizes, self.time_mix(sizes, layer), self.channel_mix(sizes)) for layer in range(sizes.n_layer)
        )
        self.blocks[0].ln0 = LayerNorm(sizes.n_embd)
        self.ln_out = LayerNorm(sizes.n_embd)
        self.head = Linear(sizes.n_embd, sizes.vocab_size)
        self.requires_grad_(False)

    @classmethod
    def from_tensors(
        cls,
        sizes: ModelSizes,
        tensors: dict[str, Tensor],
        *,
        device: torch.device | str,
        dtype: torch.dtype | None,
        quant: str | None = None,
    ) -> Self:
        """The model of the tensors that `read_weights` gave, which it takes over; for the arguments see `lm.load`.

        They stay in the mapped file where neither device nor dtype change. With `quant` only the embedding does,
        which then needs a mapping of its own.
        """
        if quant not in (None, *QUANTS):
            raise ValueError(f"quant {quant!r}: expected {' or '.join(QUANTS)}, or None")
        with torch.device("meta"):
            model = cls(sizes)
            layers = quantise_layers(model, quant) if quant else {}
        model.quant = quant
        stored = tensors["emb.weight"].dtype
        dtype = dtype or (torch.float32 if stored == torch.float64 else stored)  # nothing computes in fp64
        packed = {}
        for name, layer in layers.items():  # one after the other: of each the weights may go before the next comes
            weight = tensors.pop(f"{name}.weight")
            packed[f"{name}.packed"], packed[f"{name}.scale"] = quantise(weight, layer.quant, device)
        for name, parameter in model.state_dict().items():
            if name in packed:
                tensors[name] = packed[name]
            elif name.endswith("time_state"):
                state = tensors.get(name, torch.zeros(parameter.shape))
                tensors[name] = state.to(device, torch.float32, copy=bool(quant))
            else:  # a few that stayed in the file would hold what is packed in memory, too
                tensors[name] = tensors[name].to(device, dtype, copy=bool(quant) and name != "emb.weight")
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.emb.weight.dtype

    @property
    def n_layer(self) -> int:
        return self.sizes.n_layer

    def check_weights(self) -> None:
        """For when something has gone wrong: all of them are looked at, which takes a while.

        Raises:
            WeightsError: one holds NaN or infinite numbers.
        """
        for name, x in self.state_dict().items():
            frozen = not name.endswith("time_state") and name not in peft.parameters(self)
            if frozen and not x.isfinite().all():
                raise WeightsError(
                    f"{self.source}: {name} holds NaN or infinite numbers in {self.dtype}: get the file anew, or try "
                    "--precision bf16 or fp32"
                )

    @property
    def time_states(self) -> list[nn.Parameter]:
        """The initial state of each layer, (H, N, N) fp32, index [value, key]; (M, H, N, N) where there are several."""
        return [block.att.time_state for block in self.blocks]

    def hold_states(self, count: int) -> None:
        """Makes room for several initial states, copies of the one that is there."""
        for block in self.blocks:
            block.att.time_state = nn.Parameter(
                block.att.time_state.detach().repeat(count, 1, 1, 1), block.att.time_state.requires_grad
            )

    def initial_state(self, batch_size: int, which: Tensor | None = None) -> State:
        """The learned (or zero) initial state, shared by the batch; token shifts start from zero.

        which: (B,) integers, where there are several: that of each sample.
        """
        if (which is None) != (self.time_states[0].dim() == 3):
            raise ValueError("which initial states: to be said where there are several, and only there")
        zero = self.emb.weight.new_zeros(batch_size, self.sizes.n_embd)
        states = self.time_states if which is None else [state[which] for state in self.time_states]
        return State(tuple(LayerState(state, zero, zero) for state in states))

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (...,) int64 -> their embeddings (..., C), as `forward` takes them."""
        return F.embedding(tokens, self.emb.weight)

    def forward(
        self,
        inputs: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        which: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Runs over T positions.

        Args:
            inputs: tokens (B, T) int64, or embeddings (B, T, C).
            state: what came before; None is the initial state.
            lengths: (B,) integers in 1..T, the positions of each sample; None: T for all.
            which: (B,) integers, the initial state of each sample, where there are several.

        Returns:
            Hidden vectors (B, T, C), meaningless after each sample's length, in the dtype of the weights (fp32 where
            that is fp16), and the state after its last position.
        """
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        x = x.to(self.dtype)
        state = state or self.initial_state(x.shape[0], which)
        return graphs.step(self, x, state) if graphs.takes(self, x, lengths) else self.run(x, state, lengths)

    def run(self, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """`forward` for embeddings in the dtype of the weights, and always as it stands here."""
        x = self.blocks[0].ln0(x)
        if x.dtype == torch.float16:
            x = x.float()
        call = self._block if torch.is_grad_enabled() else Block.__call__
        if self.checkpointing and torch.is_grad_enabled():
            call = functools.partial(checkpoint, call, use_reentrant=False)
        v_first, after = None, []
        for block, before in zip(self.blocks, state.layers, strict=True):
            x, v_first, layer = call(block, x, v_first, *before, lengths)
            after.append(layer)
        return x, State(tuple(after))

    def compile_blocks(self, on: bool = True, backend: str = "inductor") -> None:
        """Has training steps fuse what lies between the matrix products of a block.

        It is compiled once for all blocks and lengths, and again for batches of 1, conversations in pieces and so on.
        """
        if on:
            torch._dynamo.config.recompile_limit = 32  # beyond it no more is compiled
        self._block = torch.compile(Block.forward, dynamic=True, backend=backend) if on else Block.__call__

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden vectors (..., C) -> logits (..., vocabulary) in the dtype of the weights."""
        return self.head(self.ln_out(hidden))


def norm_heads(y: Tensor, norm: nn.GroupNorm, dtype: torch.dtype) -> Tensor:
    """y (B, T, H, N) of the WKV operator, normed head by head in fp32 -> (B, T, C)."""
    B, T, H, N = y.shape
    y = F.group_norm(y.reshape(B * T, H * N).float(), H, norm.weight.float(), norm.bias.float(), norm.eps)
    return y.to(dtype).view(B, T, H * N)


def shift(x: Tensor, before: Tensor) -> Tensor:
    """x (B, T, C) one step later: `before` (B, C) comes first, the last vector is dropped."""
    return torch.cat([before[:, None].to(x.dtype), x[:, :-1]], dim=1)


def last(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The vectors (B, C) at each sample's last position of x (B, T, C)."""
    if lengths is None:
        return x[:, -1].clone()  # a view would keep all of x for as long as the state is kept
    return x[torch.arange(x.shape[0], device=x.device), lengths.to(x.device) - 1]
