"""Kills training at random moments, goes on by the same command, and compares with a run that was never killed.

    python tests/slow/kill_test.py [--kills 20] [--processes 1] [--strategy auto] [--seed 0]

Takes about 10 s for each kill, most of it starting Python. The whole process group gets SIGKILL, at a random moment
after the first sign of life of the run, so that each life trains for a few per cent of the whole; resume points and
mission files are written every two steps, so that many kills come in the middle of writing. Prints one JSON line:
whether the final weights are equal bit for bit, the largest difference, how many kills left a half-written file, how
far each life came.

Last result, 20 kills and 498 steps each: one process, 1 kill left a half-written file, weights equal bit for bit; two
processes (ddp), 3 kills, equal bit for bit, so no sample was lost or came twice.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.tiny import write_world  # noqa: E402

LONGEST_LIFE = 1.2  # of the time of the whole run, over the kills; a life of average length gets half of it


def start(project: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), f"--proj_dir={project}", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (project.parent / f"{project.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(project: Path, flags: list[str]) -> None:
    if start(project, flags).wait(timeout=600):
        raise SystemExit((project.parent / f"{project.name}.log").read_text()[-2000:])


def reached(project: Path) -> int:
    """The step of the newest resume point."""
    return max((int(p.stem.partition("=")[2]) for p in project.glob("checkpoints/run-*/step=*.ckpt")), default=0)


def life(project: Path, flags: list[str], delay: float) -> bool:
    """Starts the command and kills it so many seconds after its first sign of life; whether it was killed."""
    record = project / "checkpoints/run-1/run.json"
    before = record.stat().st_mtime_ns if record.exists() else 0
    process = start(project, flags)
    while process.poll() is None and not (record.exists() and record.stat().st_mtime_ns != before):
        time.sleep(0.01)
    try:
        process.wait(timeout=delay)
        if process.returncode:
            raise SystemExit((project.parent / f"{project.name}.log").read_text()[-2000:])
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def weights(project: Path) -> dict[str, torch.Tensor]:
    newest = max(project.glob("rwkv-adapter-*.pth"), key=lambda path: int(path.stem.split("-")[2]))
    return torch.load(newest, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps_per_kill", type=int, default=25)
    args = parser.parse_args()
    dice = random.Random(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        epochs = max(2, args.kills * args.steps_per_kill // 6)
        flags = [
            *write_world(folder),
            f"--devices={args.processes}",
            f"--strategy={args.strategy}",
            f"--micro_bsz={4 // args.processes}",
            f"--epoch_count={epochs}",
            "--adapter_hidden=2048",  # files of some megabytes, so that writing them takes a good part of the time
            *("--save_steps=2", "--num_workers=0", "--warmup_steps=4", "--lr_init=1e-3", "--lr_final=1e-4"),
        ]
        began_whole = time.monotonic()
        finish(folder / "whole", flags)
        longest = LONGEST_LIFE * (time.monotonic() - began_whole) / args.kills
        project, torn, lives = folder / "killed", 0, [0]
        while len(lives) <= args.kills:
            if not life(project, flags, dice.uniform(0.0, longest)):
                raise SystemExit(f"the run ended after {len(lives) - 1} kills: give more --steps_per_kill")
            torn += any(project.rglob("*.part"))
            lives.append(reached(project))
        finish(project, flags)
        expected, found = weights(folder / "whole"), weights(project)
        numbers = {
            side: sorted(p.name for p in (folder / side).glob("rwkv-adapter-*.pth")) for side in ("whole", "killed")
        }
        difference = max((expected[key] - found[key]).abs().max().item() for key in expected)
        print(
            json.dumps(
                {
                    "kills": len(lives) - 1,
                    "equal": all(torch.equal(expected[key], found[key]) for key in expected),
                    "largest_difference": difference,
                    "same_files": numbers["whole"] == numbers["killed"],
                    "killed_while_writing": torn,
                    "resume_points": lives,
                    "steps": 6 * epochs,
                    "processes": args.processes,
                    "strategy": args.strategy,
                    "minutes": round((time.monotonic() - began) / 60, 1),
                }
            )
        )


if __name__ == "__main__":
    main()
