"""Frozen RWKV language models, of generation 6 and 7 behind one interface."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from rwkv_speech.lm.language_model import LanguageModel


def model_class(generation: int) -> "type[LanguageModel]":
    """The class of the models of a generation, 6 or 7."""
    from rwkv_speech.lm.rwkv6 import RWKV6
    from rwkv_speech.lm.rwkv7 import RWKV7

    return {6: RWKV6, 7: RWKV7}[generation]


def load(
    path: str | Path,
    *,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
    quant: str | None = None,
) -> "LanguageModel":
    """Reads a .pth or .safetensors file of an RWKV-6 or RWKV-7; its tensors decide which of them it is.

    What changes neither device nor dtype stays in the mapped file, with `quant` only the embedding. As long as the
    model lives, the file may be replaced by renaming, but not written to.

    Args:
        path: an official file, or one in its form; a `time_state` in it becomes the initial state.
        device: where the weights go.
        dtype: fp32, bf16 or fp16; None keeps that of the file's embedding.
        quant: "int8" or "nf4": how the large matrices are kept, see `lm.quantised`; None: in `dtype`, as all else.

    Raises:
        WeightsError: the file can't be read, or holds no complete RWKV-6 or RWKV-7.
        ValueError: no such quant.
    """
    from rwkv_speech.lm.weights import read_weights

    # In a mapping of its own: that of all others can go when these are packed, and of this one a run reads the rows of
    # the tokens that it meets.
    embedding = read_weights(path)[1]["emb.weight"] if quant else None
    sizes, tensors = read_weights(path)
    if embedding is not None:
        tensors["emb.weight"] = embedding
    model = model_class(sizes.generation).from_tensors(sizes, tensors, device=device, dtype=dtype, quant=quant)
    model.source = str(path)
    return model
