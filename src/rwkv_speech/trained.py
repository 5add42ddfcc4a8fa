"""What is trained, in one list: of each tensor how it learns, and what it is a part of.

Optimiser, clipping, averaging, mission files, resume points and DeepSpeed's split of frozen and trained all read it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rwkv_speech.lm import peft
from rwkv_speech.lm.language_model import LanguageModel
from rwkv_speech.options import TrainingOptions
from rwkv_speech.speech.adapter import Adapter

STATE = "language_model.blocks.{}.att.time_state"
ADAPTER = "speech_encoder.adapter."


@dataclass(frozen=True)
class TrainedTensor:
    """One trained tensor.

    parameter: fp32, in the model.
    part: "adapter", "state" or "peft"; the learning rates of the last two are scaled by `state_lr_scale` and
        `peft_lr_scale`.
    decay: whether weight decay is for it.
    """

    parameter: nn.Parameter
    part: str
    decay: bool


def trained_tensors(language_model: LanguageModel, adapters: Sequence[Adapter]) -> dict[str, TrainedTensor]:
    """Everything that can be trained: all states of a layer are one tensor, (M, H, N, N) where there are several."""
    found = {name: TrainedTensor(x, "state", decay=False) for name, x in _states(language_model.time_states)}
    for place, adapter in enumerate(adapters):
        for name, x in _weights(adapter):
            found[f"{place}.{name}" if place else name] = TrainedTensor(x, "adapter", decay=x.dim() > 1)
    for name, x in peft.parameters(language_model).items():
        found[f"language_model.{name}"] = TrainedTensor(x, "peft", decay=x.dim() > 1)
    return found


def learning(tensors: Mapping[str, TrainedTensor]) -> list[nn.Parameter]:
    """Those that take gradients."""
    return [x.parameter for x in tensors.values() if x.parameter.requires_grad]


def mission_tensors(states: Sequence[Tensor], adapter: Adapter, *, published: bool = False) -> dict[str, Tensor]:
    """Initial states (H, N, N), layer by layer, and an adapter's weights, under their names in a mission file.

    published: as they go into one, which differs from the parameters where an adapter standardises its frames.
    """
    weights = adapter.published().items() if published else ()
    return dict([*_states(states), *_weights(adapter)]) | {f"{ADAPTER}{name}": x for name, x in weights}


def _states(states: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
    return ((STATE.format(layer), state) for layer, state in enumerate(states))


def _weights(adapter: Adapter) -> Iterable[tuple[str, Tensor]]:
    # Not named_parameters: those that don't learn may be buffers.
    return ((f"{ADAPTER}{i}.{name}", getattr(adapter.layers[i], name)) for i in (0, 2) for name in ("weight", "bias"))


def parameter_groups(tensors: Mapping[str, TrainedTensor], training: TrainingOptions) -> list[dict[str, Any]]:
    """What learns as groups for a torch optimiser, each with its learning rate and weight decay."""
    scales = {"state": training.state_lr_scale, "peft": training.peft_lr_scale}
    groups = []
    for part, still in sorted({(x.part, not x.decay) for x in tensors.values()}):
        params = learning({name: x for name, x in tensors.items() if (x.part, x.decay) == (part, not still)})
        groups.append(
            {
                "params": params,
                "lr": training.lr_init * scales.get(part, 1.0),
                "weight_decay": 0.0 if still else training.weight_decay,
                "name": part,
            }
        )
    return [group for group in groups if group["params"]]
