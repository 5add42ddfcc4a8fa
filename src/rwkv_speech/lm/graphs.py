"""One token of each sample on a GPU, as one CUDA graph.

A step is some fifty small kernels a layer, and launching them one by one takes twelve times as long as running them
(docs/gpu.md); a graph launches all of them at once. It reads and writes always the same memory: vectors and states are
copied there and back, so that what a call was given and what it gave stay as they are.
"""

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwkv_speech.errors import reason
from rwkv_speech.lm.state import LayerState, State

if TYPE_CHECKING:
    from rwkv_speech.lm.language_model import LanguageModel

log = logging.getLogger("rwkv_speech")

# Rows of the graphs: few, since samples leave a batch one after the other. A step reads all weights whatever their
# number, so that those which are missing cost little time. A graph holds the states of its rows twice: of a 3B model
# 42 MB a row.
ROWS = (1, 4, 16, 32, 64)

_allowed = True
_lock = threading.Lock()
_graphs: "weakref.WeakKeyDictionary[LanguageModel, dict[int, _Graph | None]]" = weakref.WeakKeyDictionary()


def allow(yes: bool) -> None:
    """Whether graphs may be used from now on."""
    global _allowed
    _allowed = yes


def takes(model: "LanguageModel", x: Tensor, lengths: Tensor | None) -> bool:
    """Whether `step` serves for embeddings x (B, T, C).

    Not beside weights of peft: some of its methods can't be captured, and where speed counts they have been merged.
    """
    if not _allowed or x.shape[1] != 1 or len(x) > ROWS[-1] or lengths is not None or model.peft or not _has_graphs(x):
        return False
    return torch.is_inference_mode_enabled()  # the memory is written to again, which autograd would not know


def step(model: "LanguageModel", x: Tensor, state: State) -> tuple[Tensor, State]:
    """`LanguageModel.forward` for x (B, 1, C); the first time for about so many samples it makes the graph.

    Where weights were moved, or are no longer quantised, it is made anew. Who puts other parameters in the place of the
    model's own calls `forget`.
    """
    rows = next(rows for rows in ROWS if rows >= len(x))
    with _lock:
        graphs = _graphs.setdefault(model, {})
        graph = graphs.get(rows)
        if graph and not graph.holds(state) and not graph.is_of(model):
            graph = None  # its memory goes before there is another
            graphs.clear()
        if rows not in graphs:
            try:
                graphs[rows] = _Graph(model, rows, x, state)
            except RuntimeError as error:  # of the driver, or the memory is full
                _warn(reason(error))
                graphs |= {more: None for more in ROWS if more >= rows}
        if graph := graphs[rows]:
            return graph.step(x, state)
    return model.run(x, state)


def forget(model: "LanguageModel") -> None:
    """Gives back the memory of a model's graphs, until they are needed again."""
    with _lock:
        _graphs.pop(model, None)


@functools.cache
def _warn(why: str) -> None:
    """Once."""
    log.warning("a CUDA graph can't be made: decoding goes on without it, slower: %s", why)


class _Graph:
    """A step for so many rows. It does not hold the model, so that this can be forgotten."""

    def __init__(self, model: "LanguageModel", rows: int, x: Tensor, state: State) -> None:
        self.quant = model.quant
        self.weights = (*model.parameters(), *model.buffers())
        self.places = [weight.data_ptr() for weight in self.weights]
        self.x = x.new_zeros(rows, *x.shape[1:])
        like = state.layers[0]
        shapes = (like.wkv.shape[-3:], like.att_shift.shape[1:], like.ffn_shift.shape[1:])
        # (L, rows, ...) of each part of a layer's state
        self.parts = [part.new_zeros(model.n_layer, rows, *shape) for part, shape in zip(like, shapes, strict=True)]
        self.held: Callable[[], State | None] = lambda: None  # the state that is in this memory, if one still has it
        self.replay = _record(lambda: self._run(model), x.device)

    def is_of(self, model: "LanguageModel") -> bool:
        """Whether the model's weights are those, and where they were."""
        return self.quant == model.quant and self.places == [weight.data_ptr() for weight in self.weights]

    def holds(self, state: State) -> bool:
        return self.held() is state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        rows, known = len(x), self.holds(state)
        self.held = lambda: None  # until all is well
        if not known:
            self._write(state, rows)
        self.x[:rows] = x
        self.replay()
        after = _state([part[:, :rows].clone() for part in self.parts])
        self.held = weakref.ref(after)
        return self.hidden[:rows].clone(), after

    def _run(self, model: "LanguageModel") -> None:
        self.hidden, after = model.run(self.x, _state(self.parts))
        self._write(after, len(self.x))

    def _write(self, state: State, rows: int) -> None:
        for part, tensors in zip(self.parts, zip(*state.layers, strict=True), strict=True):
            own = part[:, :rows].unbind()
            torch._foreach_copy_(own, [x.expand_as(y) for x, y in zip(tensors, own, strict=True)])


def _state(parts: list[Tensor]) -> State:
    return State(tuple(LayerState(*layer) for layer in zip(*parts, strict=True)))


def _has_graphs(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def _record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What launches again all that `run` launches."""
    with torch.cuda.device(device):
        run()  # what happens once, like building the operators, is not for the graph
        graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # On the one stream that torch has for all captures, graphs would share a workspace of cuBLAS, which goes with
        # the first of them; and it is the first device's. Other threads may go on meanwhile.
        how = {"stream": torch.cuda.Stream(device), "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **how):
                run()
        finally:
            torch.cuda.set_stream(outside)  # where a capture fails, torch may stay on its stream
    return graph.replay
