"""Several processes and one agree: real processes on this machine's CPU, started as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# With a large epsilon Adam's steps follow the size of the gradients, which it hides otherwise, as clipping does.
STEADY = ["--adam_eps=1", "--grad_clip=0", "--lr_init=1e-2", "--lr_final=1e-2", "--warmup_steps=2", "--num_workers=0"]


def train(world, project, *flags):
    """Runs train.py; the tensors of its last mission file, and that file's JSON."""
    command = [sys.executable, str(ROOT / "train.py"), f"--proj_dir={project}", *world.flags, *STEADY, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    path = max(project.glob("*.pth"), key=lambda path: path.stat().st_mtime_ns)
    return torch.load(path, weights_only=True), json.loads(path.with_suffix(".json").read_text())


# Of 22 utterances the last batch of an epoch has 2, one for each process.
@pytest.mark.parametrize(
    ("utterances", "steps", "more"),
    [
        pytest.param(24, 6, [], id="even"),
        pytest.param(22, 6, [], id="smaller-last-batch"),
        pytest.param(22, 3, ["--accumulate_grad_batches=2"], id="accumulating"),
    ],
)
def test_two_processes_train_as_one_with_twice_the_batch(world, tmp_path, utterances, steps, more):
    manifest = world.folder / f"{utterances}.jsonl"
    manifest.write_text("".join((world.folder / "train.jsonl").read_text().splitlines(keepends=True)[:utterances]))
    flags = [f"--data={manifest}", "--epoch_count=1", *more]
    one, info = train(world, tmp_path / "one", *flags, "--micro_bsz=4")
    assert info["step"] == steps
    two, info = train(world, tmp_path / "two", *flags, "--micro_bsz=2", "--devices=2", "--strategy=ddp")
    assert info["step"] == steps
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, atol=1e-5, rtol=0)
    states = [x for name, x in one.items() if "time_state" in name]
    assert all(x.abs().max() > 5e-5 for x in states), "the case is void: nothing was learned"
