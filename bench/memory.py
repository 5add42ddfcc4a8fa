"""Peak memory of a training step against the length of the sample, with activation checkpointing and without.

The model of bench/train.py (RWKV-6 12 x 1024, fp32) on one utterance whose frames are given, the transcript always the
same: T positions differ in their audio alone. Each measurement is a process of its own; its peak is the kernel's
(VmHWM), less what was resident before the step. glibc is told to give freed memory back at once: by its own rules it
keeps a multiple of what is in use, and the peak of live tensors is meant here. Prints one JSON line.

What a step must hold for each position, in numbers of 4 bytes:

- the adapter: K stacked frames (5 x 1024), hidden units (2048) and what it gives (1024);
- the language model's input, and with checkpointing the input of each block: (1 + 12) x 1024;
- what a block keeps for its backward pass, by `overview.block_bytes`: of one block with checkpointing, of 12 without;
- the frames themselves, in fp16: 5 x 1024 halves.

`slope_over_theory` is the slope of a straight line through the peaks over that sum. Gradients on their way through a
block come on top of it; what the block has used by then is gone already. The lengths begin where the logits of the
transcript, which don't grow with T, no longer make the peak.

python bench/memory.py [--positions 400 800 1600 2400]
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.train import WIDTH, WORDS, WORDS_EACH, batch_of, random_language_model, random_speech_model
from rwkv_speech.engine.overview import block_bytes
from rwkv_speech.lm.initialise import official_sizes

N_LAYER, N_EMBD = 12, 1024
BOUND = 1.3
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes


def measure(positions: int, checkpointing: bool) -> int:
    """Bytes that a step takes at its peak, on top of the model, its gradients and the optimiser's state."""
    model = random_speech_model(random_language_model(n_layer=N_LAYER, n_embd=N_EMBD))
    model.language_model.checkpointing = checkpointing
    K = model.adapter.downsample_k
    text = " ".join(WORDS[i % len(WORDS)] for i in range(WORDS_EACH))
    transcript = len(model.tokenizer.encode(text)) + 1  # with "#"
    optimizer = torch.optim.AdamW(model.trainable_state_dict().values())

    def step(positions: int) -> None:
        model.loss_sum(batch_of(model, [torch.randn((positions - transcript) * K, WIDTH).half()], [text])).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step(transcript + 1)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    step(positions)
    return memory("VmHWM") - before


def memory(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def bytes_per_position(checkpointing: bool) -> int:
    adapter = 5 * WIDTH + 2048 + N_EMBD
    block = block_bytes(official_sizes(n_layer=N_LAYER, n_embd=N_EMBD), 4, "cpu")
    blocks = 4 * N_LAYER + block if checkpointing else N_LAYER * block
    return round(4 * adapter + N_EMBD * (4 + blocks) + 2 * 5 * WIDTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[400, 800, 1600, 2400])
    parser.add_argument("--measure", type=int, nargs=2, help=argparse.SUPPRESS)  # a process's part: T, checkpointing
    args = parser.parse_args()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
    if args.measure:
        print(measure(args.measure[0], bool(args.measure[1])))
        return
    line: dict = {"bench": "memory", "model": f"{N_LAYER} x {N_EMBD}, fp32", "positions": args.positions}
    for checkpointing in (True, False):
        peaks = []
        for positions in args.positions:
            command = [sys.executable, __file__, "--measure", str(positions), str(int(checkpointing))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | FREE_AT_ONCE)
            peaks.append(int(done.stdout))
        slope, start = np.polyfit(args.positions, peaks, 1).tolist()
        off = np.abs(np.polyval((slope, start), args.positions) / peaks - 1).max().item()
        theory = bytes_per_position(checkpointing)
        line["checkpointing" if checkpointing else "without"] = {
            "peak_mib": [round(peak / 2**20) for peak in peaks],
            "bytes_per_position": round(slope),
            "theory": theory,
            "slope_over_theory": round(slope / theory, 3),
            "largest_deviation_from_the_line": round(off, 3),
        }
    line["bound"] = BOUND
    line["within_bound"] = line["checkpointing"]["slope_over_theory"] <= BOUND
    print(json.dumps(line))


if __name__ == "__main__":
    main()
