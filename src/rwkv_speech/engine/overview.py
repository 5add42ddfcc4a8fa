"""What a run is about to do, in one table: sizes, parameters, data, memory."""

import logging
import math

from rich.console import Console
from rich.table import Table

from rwkv_speech.engine.machine import Machine
from rwkv_speech.engine.metrics import MEASURED, WARM_UP
from rwkv_speech.lm.quantised import QuantisedLinear
from rwkv_speech.lm.weights import ModelSizes
from rwkv_speech.lm.wkv import WKV6, WKV7
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import Options, TrainingOptions

log = logging.getLogger("rwkv_speech")

# What a block of each generation keeps for the backward pass, in values per position and channel: those in the type of
# the weights, and those in fp32 whatever it is. Counted by a test.
BLOCK_VALUES = {6: (21, 1), 7: (20, 2)}
POSITIONS = 200  # of a sample, 15 s of audio and its transcript
ADAM = 8  # bytes of optimiser state for a trained weight


def block_bytes(sizes: ModelSizes, width: int, device_type: str) -> float:
    """What a block keeps per position and channel, the states that the operator saves there included.

    width: bytes of a weight.
    """
    in_type, in_fp32 = BLOCK_VALUES[sizes.generation]
    operator = {6: WKV6, 7: WKV7}[sizes.generation]
    return width * in_type + 4 * (in_fp32 + sizes.head_size / operator.saved_every[device_type])


def estimate_memory(model: SpeechRWKV, options: Options, machine: Machine) -> dict[str, float]:
    """Bytes on one device, while it trains on samples of `POSITIONS` positions.

    Frozen weights are whole on each device; fp32 weights and gradients of what is trained too, and its optimiser state
    is divided by DeepSpeed. Left out: the encoder's activations, which are dropped call by call.
    """
    sizes = model.language_model.sizes
    parameters = [*model.parameters()]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
    width = model.language_model.emb.weight.element_size()
    positions = options.training.micro_bsz * POSITIONS
    block = block_bytes(sizes, width, "cuda" if machine.accelerator == "gpu" else "cpu")
    blocks = block + width * sizes.n_layer if options.training.grad_cp else block * sizes.n_layer
    shares = machine.per_node * machine.num_nodes if machine.strategy.startswith("deepspeed") else 1
    on_device = 0 if machine.strategy.endswith("offload") else 1
    return {
        "frozen weights": frozen,
        "trained weights and optimiser": trained * (4 + 4 + on_device * ADAM / shares),
        # A quarter of the positions is the transcript; its logits are there in fp32, with their softmax and gradient.
        "activations": positions * (sizes.n_embd * blocks + sizes.vocab_size * 3 * 4 / 4),
    }


def show_run(
    model: SpeechRWKV,
    options: Options,
    machine: Machine,
    *,
    utterances: int,
    seconds: float,
    steps_to_epoch: int,
    steps_to_pass: int,
) -> None:
    """Prints the table on standard error, and warns of settings under which little or nothing can be learnt.

    steps_to_epoch, steps_to_pass: optimiser steps, the latter to all of the data.
    """
    sizes = model.language_model.sizes
    encoder, adapter = model.speech_encoder, model.adapter
    count = {kind: sum(p.numel() for p in model.parameters() if p.requires_grad == kind) for kind in (True, False)}
    memory = estimate_memory(model, options, machine)
    processes = machine.per_node * machine.num_nodes
    training = options.training
    total = steps_to_epoch * training.epoch_count
    rate = f"learning rate up to {training.largest_lr(total, total):.3g}"
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    size = f"{sizes.n_layer} x {sizes.n_embd}, vocabulary of {sizes.vocab_size:,}"
    if model.language_model.quant:
        size += f", {model.language_model.quant}"
        packed = [layer for layer in model.modules() if isinstance(layer, QuantisedLinear)]
        count[False] += sum(x.in_features * x.out_features - x.packed.numel() - x.scale.numel() for x in packed)
    table = Table(show_header=False)
    for row in (
        (
            "language model",
            f"RWKV-{sizes.generation} {size}",
        ),
        ("speech encoder", f"{encoder.name}, width {encoder.width}"),
        ("adapter", f"{adapter.downsample_k} frames to a position, {adapter.layers[0].out_features} hidden units"),
        ("trained", f"{count[True]:,} parameters"),
        ("frozen", f"{count[False]:,} parameters"),
        ("data", f"{utterances:,} utterances, {seconds / 3600:.2f} h"),
        ("processes", f"{processes} x {machine.accelerator.upper()}, {machine.precision}, strategy {machine.strategy}"),
        ("memory of each", f"about {sum(memory.values()) / 2**30:.2f} GiB at {POSITIONS} positions a sample: {parts}"),
        ("steps", f"{total:,}, {steps_to_epoch:,} to an epoch; warm-up {training.warmup_steps:,}, {rate}"),
        ("time per epoch", f"known once {WARM_UP + MEASURED} steps are done"),
    ):
        table.add_row(*row)
    Console(stderr=True, markup=False).print(table)  # paths may have brackets
    if training.epoch_steps > steps_to_pass:
        log.warning(
            "--epoch_steps %d, but an epoch ends with its pass over the data, after %d: the run has %d steps; for %d "
            "set --epoch_count %d",
            *(training.epoch_steps, steps_to_pass, total, training.epoch_steps * training.epoch_count),
            math.ceil(training.epoch_steps * training.epoch_count / steps_to_pass),
        )
    if training.ctc_align_steps >= total:
        log.warning(
            "--ctc_align_steps %d is all of the run's %d steps: the language model has no part, and its initial state "
            "learns nothing; set a smaller one",
            *(training.ctc_align_steps, total),
        )
    warn_of_warm_up(training, total, total)


def warn_of_warm_up(training: TrainingOptions, steps: int, total: int) -> None:
    """Says so where the first `steps` of `total` lie within the warm-up."""
    if steps <= training.warmup_steps:
        log.warning(
            "%d steps lie within the warm-up of %d: the learning rate gets to %.3g, where --lr_init is %g: little is "
            "learnt; set --warmup_steps to %d, say, or train for longer by --epoch_count",
            *(steps, training.warmup_steps, training.largest_lr(steps, total), training.lr_init, steps // 10),
        )
