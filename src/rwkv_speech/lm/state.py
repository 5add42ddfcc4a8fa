"""What a recurrent model carries from one token to the next."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LayerState(NamedTuple):
    """The state of one layer."""

    wkv: Tensor
    """(B, H, N, N) fp32, index [value, key]; or (H, N, N), shared by the batch."""
    att_shift: Tensor
    """(B, C), the last input of the time mix."""
    ffn_shift: Tensor
    """(B, C), the last input of the channel mix."""


@dataclass(frozen=True)
class State:
    """The state of the whole model after some tokens: of one size, however many they were."""

    layers: tuple[LayerState, ...]

    @property
    def batch_size(self) -> int:
        return self.layers[0].att_shift.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """The state with `function` applied to every tensor."""
        return State(tuple(LayerState(*map(function, layer)) for layer in self.layers))

    def select(self, samples: Tensor) -> "State":
        """The states of some samples, in that order and as often as named.

        Args:
            samples: (B',) integers, or (B,) booleans; what beam search and leaving a batch need.
        """

        def rows(x: Tensor) -> Tensor:
            return x[samples]

        shared = self.layers[0].wkv.dim() == 3
        return State(
            tuple(
                LayerState(layer.wkv if shared else rows(layer.wkv), rows(layer.att_shift), rows(layer.ffn_shift))
                for layer in self.layers
            )
        )

    @classmethod
    def cat(cls, states: "Sequence[State]") -> "State":
        """The states of several batches, none of them shared by its batch, as those of one."""
        layers = zip(*(state.layers for state in states), strict=True)  # of all batches, layer by layer
        return cls(tuple(LayerState(*map(torch.cat, zip(*layer, strict=True))) for layer in layers))

    def clone(self) -> "State":
        return self.map(torch.clone)

    def detach(self) -> "State":
        return self.map(torch.detach)

    def to(self, device: torch.device | str) -> "State":
        return self.map(lambda x: x.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors, for `torch.save`; `from_state_dict` reads them back."""
        return {f"{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer._asdict().items()}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> "State":
        n_layer = len(tensors) // len(LayerState._fields)
        return cls(tuple(LayerState(*(tensors[f"{i}.{name}"] for name in LayerState._fields)) for i in range(n_layer)))
