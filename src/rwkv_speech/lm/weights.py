"""Weight files of RWKV-6 ("x060") and RWKV-7 ("x070"): which tensors they hold, the model's size, reading in place.

One table of names and shapes for each generation, written in symbols, serves for everything: telling the sizes from
the tensors, checking the tensors, and (`initialise`) making new ones.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from rwkv_speech.tensors import DTYPES, WeightsError, few, read_tensors

# The sizes that symbols stand for in the tables below, as fields of ModelSizes. Those of both generations, then ranks.
_SYMBOLS = {"C": "n_embd", "V": "vocab_size", "H": "n_head", "N": "head_size", "F": "dim_ffn"}
_RANKS = {
    6: {"D": "dim_mix", "E": "dim_decay"},
    7: {"W": "dim_decay", "A": "dim_rate", "L": "dim_value", "G": "dim_gate"},
}
_OUTER_SHAPES = {
    "emb.weight": "V C",
    "blocks.0.ln0.weight": "C",
    "blocks.0.ln0.bias": "C",
    "ln_out.weight": "C",
    "ln_out.bias": "C",
    "head.weight": "V C",
}
_NORM_SHAPES = {f"{norm}.{part}": "C" for norm in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")}
_BLOCK_SHAPES = {
    6: {
        **_NORM_SHAPES,
        **{f"att.time_maa_{part}": "1 1 C" for part in "xwkvrg"},
        "att.time_maa_w1": "C 5D",
        "att.time_maa_w2": "5 D C",
        "att.time_decay": "1 1 C",
        "att.time_decay_w1": "C E",
        "att.time_decay_w2": "E C",
        "att.time_faaaa": "H N",
        **{f"att.{matrix}.weight": "C C" for matrix in ("receptance", "key", "value", "gate", "output")},
        "ffn.time_maa_k": "1 1 C",
        "ffn.time_maa_r": "1 1 C",
        "ffn.key.weight": "F C",
        "ffn.receptance.weight": "C C",
        "ffn.value.weight": "C F",
    },
    7: {
        **_NORM_SHAPES,
        **{f"att.x_{part}": "1 1 C" for part in "rwkvag"},
        "att.w0": "1 1 C",
        "att.w1": "C W",
        "att.w2": "W C",
        "att.a0": "1 1 C",
        "att.a1": "C A",
        "att.a2": "A C",
        "att.v0": "1 1 C",
        "att.v1": "C L",
        "att.v2": "L C",
        "att.g1": "C G",
        "att.g2": "G C",
        "att.k_k": "1 1 C",
        "att.k_a": "1 1 C",
        "att.r_k": "H N",
        **{f"att.{matrix}.weight": "C C" for matrix in ("receptance", "key", "value", "output")},
        "ffn.x_k": "1 1 C",
        "ffn.key.weight": "F C",
        "ffn.value.weight": "C F",
    },
}
# The first layer has no earlier layer's values to mix in. Some files have these tensors all the same, of any size.
_UNUSED = {6: set(), 7: {f"blocks.0.att.v{i}" for i in range(3)}}
_STATE, _STATE_SHAPE = "att.time_state", "H N N"

# What only this generation (and none above it in the list) has; the names are those of BlinkDL/RWKV-LM.
_GENERATIONS = (
    ("7b", re.compile(r"\.qkv\.")),
    ("7a", re.compile(r"\.ffn\.(s_emb|s\d$)")),
    ("7", re.compile(r"\.att\.(r_k|x_r|w0|a0)$")),
    ("6", re.compile(r"\.time_maa_")),
    ("5", re.compile(r"\.att\.(ln_x\.weight|gate\.weight|time_mix_g|time_faaaa)$")),
    ("4", re.compile(r"\.att\.(time_mix_k|time_first)$")),
)
_EXPECTED = "expected RWKV-6 (x060) or RWKV-7 (x070) in the official form: take such a file, e.g. rwkv7-g1k-2.9b"


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """All that the tensors' names and shapes say about a model."""

    generation: int = 6
    """6 or 7."""
    n_layer: int
    """Blocks."""
    n_embd: int
    """Width C of the residual stream."""
    n_head: int
    """Heads H of the time mix; H * N = C."""
    head_size: int
    """Channels N of a head."""
    dim_ffn: int
    """Hidden width F of the channel mix."""
    vocab_size: int
    """Rows V of the embedding and of the head."""
    dim_decay: int
    """Rank of the low-rank decay product."""
    dim_mix: int = 0
    """RWKV-6: rank of each of the five low-rank token-shift products."""
    dim_rate: int = 0
    """RWKV-7: rank of the product of the learning rate, a."""
    dim_value: int = 0
    """RWKV-7: rank of the product that mixes in the first layer's values; 0 where there is but one layer."""
    dim_gate: int = 0
    """RWKV-7: rank of the gate's product."""

    @property
    def n_params(self) -> int:
        """Numbers in an official file, the initial state not counted."""
        return sum(map(prod, expected_shapes(self).values()))


def expected_shapes(sizes: ModelSizes, *, time_state: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of an official file and its shape, in the order of the model.

    Args:
        sizes: of the model.
        time_state: with the initial states, (H, N, N) in each block, which a plain file doesn't have.
    """
    fields = _SYMBOLS | _RANKS[sizes.generation]
    values = {symbol: getattr(sizes, field) for symbol, field in fields.items()}
    table = _symbolic_shapes(sizes.generation, sizes.n_layer, time_state=time_state)
    return {name: _evaluate(symbols, values) for name, symbols in table.items()}


def infer_sizes(tensors: Mapping[str, Tensor]) -> ModelSizes:
    """Infers the sizes from the tensors and checks every one of them; only shapes and dtypes are looked at.

    Each size is what most of the tensors that have it agree on, so that one misshapen tensor is named as such
    instead of condemning all others. Shapes may lack or add leading 1s, as (C,) for (1, 1, C).

    Raises:
        WeightsError: the tensors are no RWKV-6 or RWKV-7 (it says which generation they look like), or some are
            missing, misshapen, no floating-point numbers or unknown: one message with all of them. Unknown
            tensors are an error because variations of RWKV show in nothing else (a mixture of experts, an added
            attention): without them the model would run, and compute something that was never trained.
    """
    generation = _generation(tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _UNUSED[generation]}
    # Counted, for a name may claim any number.
    n_layer = len({match[1] for match in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if match})
    table = _symbolic_shapes(generation, n_layer, time_state=_has_state(tensors))
    values = _majority(tensors, _symbolic_shapes(generation, n_layer, time_state=False))

    missing = [(name, "") for name in table if name not in tensors]
    unknown = [(name, "") for name in tensors if name not in table]
    wrong = []
    for name, symbols in table.items():
        if name not in tensors:
            continue
        core = _core(symbols)
        if _trimmed(tensors[name].shape, len(core)) != _evaluate(core, values):
            given, expected = tuple(tensors[name].shape), _evaluate(symbols, values)
            wrong.append((name, f" is {_written(given)}, expected {_written(expected)}"))
        if tensors[name].dtype not in DTYPES:
            wrong.append((name, f" holds {tensors[name].dtype}, expected floating-point numbers of 16 bits or more"))
    heads, size, width = (values.get(symbol) for symbol in "HNC")
    if heads and size and width and heads * size != width:
        wrong.append(
            (
                "time_faaaa" if generation == 6 else "r_k",
                f" has {heads} heads of {size}, which do not make the width {width}",
            )
        )

    kinds = {"missing": missing, "misshapen": wrong, "unknown": unknown}
    if problems := [f"{kind}: {_by_layer(found, n_layer)}" for kind, found in kinds.items() if found]:
        raise WeightsError(
            f"not the tensors of a whole RWKV-{generation} (x0{generation}0) with {n_layer} layers; "
            f"{'; '.join(problems)}; get the file again, or one that was not converted to another form"
        )
    fields = _SYMBOLS | _RANKS[generation]
    sizes = {field: values.get(symbol, 0) for symbol, field in fields.items()}
    return ModelSizes(generation=generation, n_layer=n_layer, **sizes)


def read_weights(path: str | Path) -> tuple[ModelSizes, dict[str, Tensor]]:
    """Opens a `.pth` or `.safetensors` file of an RWKV-6 or RWKV-7 in place.

    The tensors are memory-mapped, privately: nothing is read before it is used, and changing one never
    reaches the file. A matrix whose rows don't lie one after the other is copied, and a file in torch's form
    from before version 1.6 is read into memory, once.

    Returns:
        The sizes, and the tensors in the file's dtypes under their official names with the shapes of
        `expected_shapes`; with `blocks.{l}.att.time_state` (H, N, N), indexed [value, key], if it has them.

    Raises:
        WeightsError: one line that says what is wrong with the file.
    """
    try:
        content = read_tensors(path)
        sizes = infer_sizes(content)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    shapes = expected_shapes(sizes, time_state=_has_state(content))
    return sizes, {name: content[name].reshape(shape).contiguous() for name, shape in shapes.items()}


def _symbolic_shapes(generation: int, n_layer: int, *, time_state: bool) -> dict[str, list[str]]:
    block = _BLOCK_SHAPES[generation] | ({_STATE: _STATE_SHAPE} if time_state else {})
    shapes = dict(_OUTER_SHAPES)
    for layer in range(n_layer):
        shapes.update({f"blocks.{layer}.{name}": symbols for name, symbols in block.items()})
    return {name: symbols.split() for name, symbols in shapes.items() if name not in _UNUSED[generation]}


def _has_state(names: Iterable[str]) -> bool:
    return any(name.endswith(_STATE) for name in names)


def _core(symbols: list[str]) -> list[str]:
    return [symbol for symbol in symbols if symbol != "1"]


def _trimmed(shape: Sequence[int], n_dims: int) -> tuple[int, ...]:
    """The shape without as many leading 1s as it has too many dimensions."""
    spare = max(len(shape) - n_dims, 0)
    return tuple(shape[spare:]) if all(size == 1 for size in shape[:spare]) else tuple(shape)


def _evaluate(symbols: list[str], values: Mapping[str, int]) -> tuple:
    """The shape in numbers; a symbol of unknown value stays as it is, and equals no size."""
    known = {"1": 1, "5": 5, **values}
    if "D" in values:
        known["5D"] = 5 * values["D"]
    return tuple(known.get(symbol, symbol) for symbol in symbols)


def _majority(tensors: Mapping[str, Tensor], table: Mapping[str, list[str]]) -> dict[str, int]:
    """The value of each symbol that most tensors agree on; at a tie, that of the first in the table."""
    votes: dict[str, Counter[int]] = {}
    for name, symbols in table.items():
        core = _core(symbols)
        shape = _trimmed(tensors[name].shape, len(core)) if name in tensors else ()
        if len(shape) == len(core):
            for symbol, size in zip(core, shape, strict=True):
                votes.setdefault(symbol, Counter())[size] += 1
    return {symbol: votes[symbol].most_common(1)[0][0] for symbol in votes}


def _generation(names: Iterable[str]) -> int:
    names = list(names)
    looks = next((number for number, mark in _GENERATIONS if any(map(mark.search, names))), None)
    if looks is None:
        raise WeightsError(f"its tensors ({few(names) or 'none'}) look like no RWKV of generation 4 to 7; {_EXPECTED}")
    if looks not in ("6", "7"):
        raise WeightsError(f"its tensors look like RWKV-{looks}; {_EXPECTED}")
    return int(looks)


def _by_layer(problems: list[tuple[str, str]], n_layer: int) -> str:
    """(name, what is wrong) pairs as text; what every layer has is said once, as `blocks.*`."""
    groups: dict[str, list[str]] = {}
    for name, what in problems:
        groups.setdefault(re.sub(r"^blocks\.\d+", "blocks.*", name) + what, []).append(name + what)
    texts = []
    for pattern, members in groups.items():
        texts.extend([pattern] if len(members) == n_layer > 1 else members)
    return few(texts, 20)


def _written(shape: tuple) -> str:
    return f"({', '.join(map(str, shape))})"
