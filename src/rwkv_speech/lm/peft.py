"""What the library peft trains beside the frozen matrices: LoRA, DoRA, PiSSA, MiSS and others of its methods.

The library takes seconds to import, and is imported where it is used. Its weights are fp32, whatever the frozen ones
are. Unmerged, they work in training and in decoding; merged, the model is one as any other, and as fast.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rwkv_speech.errors import UserError, reason
from rwkv_speech.files import write_whole
from rwkv_speech.lm.linear import Linear
from rwkv_speech.lm.quantised import QuantisedLinear
from rwkv_speech.options import PEFT_METHODS
from rwkv_speech.tensors import WeightsError, few, read_tensors

if TYPE_CHECKING:
    from rwkv_speech.lm.language_model import LanguageModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of a folder in the library's form
_NAME = "default"  # of the one set of weights that a model has
_PREFIX = "base_model.model."  # before each name in a file
# Forms of LoRA that have names of their own.
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
_BESIDE = (True, False, "gaussian", "orthogonal")  # initialisations of LoRA that leave the frozen weights as they are
# What would train something else than what is put beside matrices, or can't be merged into them.
_ELSEWHERE = (
    *("modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "lora_bias"),
    "megatron_config",  # names a module to be imported
)
_RWKV_PEFT = re.compile(r"(.+)\.lora_([AB])")


@dataclass(frozen=True)
class PeftWeights:
    """What a folder in the library's form holds: its configuration, and name -> tensor."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def equals(self, other: "PeftWeights | None") -> bool:
        return (
            other is not None
            and self.config == other.config
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.equal(x, other.tensors[name]) for name, x in self.tensors.items())
        )


@dataclass(frozen=True)
class Injected:
    """What a language model knows of the weights beside its own.

    config: the library's configuration.
    method: its name.
    names: of those that can be trained.
    initial: what they were at first, where the frozen weights were changed to fit.
    """

    config: Any
    method: str
    names: tuple[str, ...]
    initial: dict[str, Tensor]


def import_peft() -> ModuleType:
    """The library.

    Raises:
        UserError: it isn't installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"LoRA and its kin need the package peft ({error}): pip install peft, or sh demo/setup.sh peft"
        ) from None
    return peft


def configuration(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a method by its name, checked.

    method: one of PEFT_METHODS.
    given: what else is to be set.

    Raises:
        UserError: no such method, or settings that it doesn't have.
    """
    if method not in PEFT_METHODS:
        raise UserError(
            f"{method!r} is no part that can be trained: expected adapter, state, or of peft {', '.join(PEFT_METHODS)}"
        )
    peft = import_peft()
    kind = "lora" if method in VARIANTS else method
    if kind.upper() not in peft.PeftType.__members__:
        raise UserError(f"this version of the package peft has no {method}: pip install --upgrade peft")
    config = {"peft_type": kind.upper(), **VARIANTS.get(method, {}), **given}
    kinds = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind.upper())].__dataclass_fields__
    if unknown := [name for name in given if name not in kinds]:
        own = ", ".join(sorted(kinds.keys() - peft.PeftConfig.__dataclass_fields__.keys()))
        raise UserError(f"peft_config: {method} has no setting {unknown[0]!r}, but {own}")
    return config


def method_of(config: Mapping[str, Any]) -> str:
    """The name of the method of a configuration."""
    found = [name for name, own in VARIANTS.items() if own.items() <= config.items()]
    return found[0] if found else config["peft_type"].lower()


def inject(model: "LanguageModel", config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Puts the weights of a method beside the frozen matrices of the blocks, ready to be trained.

    model: with its own weights, as from its file.
    config: as `configuration` gives it; where it names no `target_modules`, or "all-linear", these are all matrices of
        the blocks, without the head.
    tensors: their values, as in a folder's file; None: the method's own initialisation.

    Raises:
        UserError: settings that the library or this model does not take, or tensors that don't fit.
    """
    peft = import_peft()
    config = {name: value for name, value in config.items() if name not in ("auto_mapping", "inference_mode")}
    if config.get("target_modules") in (None, [], "all-linear"):
        linears = [name for name, x in model.blocks.named_modules() if isinstance(x, Linear)]
        config["target_modules"] = sorted({name.rpartition(".")[2] for name in linears})
    method = method_of(config)
    if method not in PEFT_METHODS:
        raise UserError(f"weights of the method {method!r} of peft: expected {', '.join(PEFT_METHODS)}")
    if others := [name for name in _ELSEWHERE if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none"):
        raise UserError(f"peft_config: {others[0]} does not go here: only what lies beside matrices is trained")
    if model.quant and not (
        config["peft_type"] in ("LORA", "MISS") and config.get("init_lora_weights", True) in _BESIDE
    ):
        raise UserError(
            f"{method} changes the frozen weights: leave out --quant {model.quant}, or take lora, dora, miss"
        )
    learning = [x for x in model.parameters() if x.requires_grad]
    before = {id(x) for x in model.parameters()}
    try:
        made = peft.PeftConfig.from_peft_type(**config)
        made.base_model_name_or_path = Path(model.source).name
        changes = made.peft_type == "LORA" and made.init_lora_weights not in _BESIDE
        if changes and made.use_dora:
            raise ValueError("another initialisation does not go with use_dora")
        with _compilers_kept():
            peft.inject_adapter_in_model(made, model, _NAME)
        added = {name: x for name, x in model.named_parameters() if x.requires_grad and id(x) not in before}
        injected = {name: x.get_base_layer() for name, x in model.named_modules() if hasattr(x, "get_base_layer")}
        if others := [name for name, x in injected.items() if not isinstance(x, Linear | QuantisedLinear)]:
            raise ValueError(f"target_modules: {others[0]} is no matrix that is multiplied by")
        for x in added.values():
            x.data = x.data.float()
        initial = {name: x.detach().cpu().clone() for name, x in added.items()} if changes else {}
        if tensors is not None:
            names = {name.removeprefix(_PREFIX): x.float() for name, x in tensors.items()}
            expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
            if names.keys() != expected.keys():
                odd = sorted(names.keys() ^ expected.keys())
                raise ValueError(f"its tensors are not those of this model: {few(odd)}")
            peft.set_peft_model_state_dict(model, names)
    except Exception as error:  # of whatever kind the library finds
        raise UserError(f"peft: {method} can't be put beside this model: {reason(error)}") from error
    for x in learning:  # which the library has frozen, too
        x.requires_grad_()
    model.eval()  # what it drops by chance, it drops in training
    model.peft = Injected(made, method, tuple(added), initial)
    for block in model.blocks:
        block.whole_step = False  # it reads the frozen weights only


@contextmanager
def _compilers_kept() -> Iterator[None]:
    """For BOFT, which leaves its compiler behind where its kernel can't be built."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def parameters(model: "LanguageModel") -> dict[str, nn.Parameter]:
    """Those that can be trained, by their names in the model; none where nothing was injected."""
    return _of(model, model.peft.names) if model.peft else {}


def _of(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
    return {name: attrgetter(name)(model) for name in names}


def weights(model: "LanguageModel") -> PeftWeights | None:
    """What a folder is to hold, which goes with the frozen weights as their file has them.

    Where these were changed at first, as PiSSA does it, it is LoRA of twice the rank: what was learnt, less that.
    """
    if model.peft is None:
        return None
    peft, made, initial = import_peft(), model.peft.config, model.peft.initial
    kept = {**model.state_dict(), **parameters(model)}  # under DeepSpeed what doesn't learn is a buffer, not kept
    found = peft.get_peft_model_state_dict(model, state_dict=kept, save_embedding_layers=False)
    tensors = {name: x.detach().cpu() for name, x in found.items()}
    config = json.loads(json.dumps(made.to_dict(), default=lambda x: sorted(x) if isinstance(x, set) else x.value))
    if initial:
        for name in tensors:
            first = initial[name.replace(".weight", f".{_NAME}.weight")]
            A = ".lora_A." in name
            tensors[name] = torch.cat([tensors[name], first if A else -first], dim=0 if A else 1)
        grown = math.sqrt(2) if made.use_rslora else 2  # keeps what products are multiplied by
        config |= {"init_lora_weights": True, "r": 2 * made.r, "lora_alpha": grown * made.lora_alpha}
        config["rank_pattern"] = {name: 2 * r for name, r in made.rank_pattern.items()}
        config["alpha_pattern"] = {name: grown * alpha for name, alpha in made.alpha_pattern.items()}
    tensors = {_PREFIX + name: x.contiguous() for name, x in tensors.items()}
    return PeftWeights(config | {"inference_mode": True}, tensors)


@torch.no_grad()
def merge(model: "LanguageModel") -> None:
    """Puts what was injected into the weights themselves, with fp32 arithmetic, matrix by matrix.

    A quantised model becomes a float one, of what its packed matrices stand for.

    Raises:
        UserError: the method's weights can't be merged.
    """
    for name, layer in [*model.named_modules()]:
        if hasattr(layer, "get_base_layer"):
            model.set_submodule(name, _linear(merged_weight(layer), model.dtype))
    if model.quant:
        for name, layer in [*model.named_modules()]:
            if isinstance(layer, QuantisedLinear):
                model.set_submodule(name, _linear(layer.weight, model.dtype))
    model.quant = model.peft = None
    del model.peft_config
    for block in model.blocks:
        block.whole_step = True


def merged_weight(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The matrix (O, K), fp32, that a layer of the library's stands for, of its own frozen weight or another.

    Raises:
        UserError: the method's weights can't be merged.
    """
    frozen = layer.get_base_layer()
    weight = frozen.weight if weight is None else weight
    layer.base_layer = _linear(weight.detach().to(torch.float32, copy=True), torch.float32)
    try:
        layer.merge()
        return layer.base_layer.weight.detach()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise UserError(f"peft: its weights can't be merged: {reason(error)}") from error
    finally:
        layer.merged_adapters.clear()
        layer.base_layer = frozen


def _linear(weight: Tensor, dtype: torch.dtype) -> Linear:
    with torch.device("meta"):
        layer = Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer


def write_folder(folder: Path, found: PeftWeights) -> None:
    """Writes a folder in the library's form; each file is there whole or not at all."""
    write_whole(folder / WEIGHTS, save(dict(found.tensors), {"format": "pt"}))
    write_whole(folder / CONFIG, (json.dumps(found.config, indent=2, sort_keys=True) + "\n").encode())


def remove_folder(folder: Path) -> None:
    """Removes what `write_folder` wrote, and the folder where nothing else is in it."""
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def read_folder(folder: Path) -> PeftWeights:
    """Reads a folder in the library's form, without the library.

    Raises:
        WeightsError: it is none, or its weights can't be used.
    """
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{folder / CONFIG}: can't be read ({reason(error)}); expected a folder of peft") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise WeightsError(f"{folder / CONFIG}: names no peft_type; expected what peft writes")
    return PeftWeights(config, _read(folder / WEIGHTS))


def read(path: str | Path, given: Mapping[str, Any]) -> PeftWeights:
    """Reads a folder in the library's form, or a LoRA file of RWKV-PEFT, whose `lora_alpha` is `given`.

    Raises:
        WeightsError: it is neither, its weights can't be used, or `given` is not what is needed.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if given:
            raise WeightsError(f"{path}: has a configuration of its own; leave out --peft_config")
        return read_folder(path)
    tensors = _read(path)
    names = {name: _RWKV_PEFT.fullmatch(name) for name in tensors}
    if strange := [name for name, found in names.items() if not found]:
        raise WeightsError(f"{path}: holds {few(strange)}; expected only <matrix>.lora_A and .lora_B, as of RWKV-PEFT")
    if given.keys() != {"lora_alpha"}:
        raise WeightsError(f"{path}: does not hold its lora_alpha: give it, alone, by --peft_config lora_alpha=...")
    ranks = {x.shape[0] for name, x in tensors.items() if names[name][2] == "A"}
    if len(ranks) != 1:
        raise WeightsError(f"{path}: its matrices have the ranks {sorted(ranks)}; expected one")
    targets = sorted({found[1] for found in names.values()})
    config = {"peft_type": "LORA", "r": ranks.pop(), "target_modules": targets, **given}
    return PeftWeights(config, {f"{_PREFIX}{f[1]}.lora_{f[2]}.weight": tensors[name] for name, f in names.items()})


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors = read_tensors(path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    if bad := [name for name, x in tensors.items() if not x.is_floating_point() or not x.isfinite().all()]:
        raise WeightsError(f"{path}: {few(bad)} holds NaN or infinite numbers; take an earlier file")
    return tensors
