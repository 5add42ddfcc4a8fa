"""Kills an operation at random moments, goes on by the same command, and compares with one that was never killed.

    python tests/slow/kill_test.py [--operation train|eval|cache] [--load_model rwkv6|rwkv7|FILE] [--kills 20]
                                   [--processes 1] [--strategy auto] [--seed 0]

Takes about 10 s for each kill, most of it starting Python. The whole process group gets SIGKILL, at a random moment:
after a random share of the work, a few per cent of the whole, and some milliseconds. Prints one JSON line.

- train: resume points and mission files are written every two steps, so that many kills come in the middle of writing.
  Equal are the final weights, bit for bit, and the names of the files.
- eval: goes on by --resume. Equal are ids, hypotheses and scores, each utterance once; no record that a killed process
  had written is decoded again.
- cache: fills a cache of frames in batches of 4 s. Equal are the frames, bit for bit.

Last results, all equal to the undisturbed run, bit for bit where that is asked: 20 kills each of training (498 steps),
evaluation (300 utterances, none decoded again) and caching (600 recordings), 12 of training with an RWKV-7 (300 steps).
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
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from rwkv_speech.data.manifest import read_manifest  # noqa: E402
from rwkv_speech.mission_file import write_mission_file  # noqa: E402
from rwkv_speech.model import SpeechRWKV  # noqa: E402
from rwkv_speech.speech.frame_cache import FrameCache  # noqa: E402
from rwkv_speech.speech.shards import RECORD_BYTES  # noqa: E402
from tests.tiny import write_world  # noqa: E402

LONGEST_LIFE = 1.0  # of the whole work, over the kills; a life of average length does half of it
MOMENT = 0.05  # s; a kill comes so long, at most, after its share of the work
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from rwkv_speech.speech import frame_cache
frame_cache._BATCH_SECONDS = 4.0
sys.exit(train.main())
"""


@dataclass
class Training:
    """Trains for some epochs."""

    folder: Path
    args: argparse.Namespace

    def __post_init__(self) -> None:
        epochs = max(2, self.args.kills * self.args.steps_per_kill // 6)
        self.size = 6 * epochs
        self.flags = [
            *world(self.folder, self.args),
            f"--strategy={self.args.strategy}",
            f"--micro_bsz={4 // self.args.processes}",
            f"--epoch_count={epochs}",
            "--adapter_hidden=2048",  # files of some megabytes, so that writing them takes a good part of the time
            *("--save_steps=2", "--warmup_steps=4", "--lr_init=1e-3", "--lr_final=1e-4"),
        ]

    def sign(self, project: Path) -> int:
        """Changes with the first work of each life."""
        record = project / "checkpoints/run-1/run.json"
        return record.stat().st_mtime_ns if record.exists() else 0

    def reached(self, project: Path) -> int:
        """How much of `size` is done: the step of the newest resume point."""
        return max((int(p.stem.partition("=")[2]) for p in project.glob("checkpoints/run-*/step=*.ckpt")), default=0)

    def compare(self, whole: Path, killed: Path) -> dict[str, object]:
        expected, found = self._weights(whole), self._weights(killed)
        names = [sorted(path.name for path in side.glob("rwkv-adapter-*.pth")) for side in (whole, killed)]
        return {
            "equal": all(torch.equal(expected[key], found[key]) for key in expected) and names[0] == names[1],
            "largest_difference": max((expected[key] - found[key]).abs().max().item() for key in expected),
        }

    @staticmethod
    def _weights(project: Path) -> dict[str, torch.Tensor]:
        newest = max(project.glob("rwkv-adapter-*.pth"), key=lambda path: int(path.stem.split("-")[2]))
        return torch.load(newest, weights_only=True)


@dataclass
class Evaluation:
    """Evaluates a mission file that was never trained, whose answers are long."""

    folder: Path
    args: argparse.Namespace

    def __post_init__(self) -> None:
        self.size = 15 * self.args.kills
        flags = world(self.folder, self.args, self.size)
        adapter = self.folder / "mission.pth"
        load_model = flags[0].partition("=")[2]
        model = SpeechRWKV.from_pretrained(load_model, encoder=str(self.folder / "encoder"), adapter_hidden=32)
        for state in model.language_model.time_states:
            torch.nn.init.normal_(state)
        write_mission_file(adapter, model.trainable_state_dict(), model.describe())
        self.flags = [*flags, "--op=eval", "--resume", "--eval_bsz=1", "--max_new_tokens=40", f"--adapter={adapter}"]
        self.kept: defaultdict[Path, set[bytes]] = defaultdict(set)  # records that were seen in a project

    def sign(self, project: Path) -> int:
        return sum(path.stat().st_size for path in project.glob("eval/unfinished/all/*.jsonl"))

    def reached(self, project: Path) -> int:
        lines = [line for path in project.glob("eval/unfinished/all/*.jsonl") for line in path.open("rb")]
        self.kept[project].update(line for line in lines if line.endswith(b"\n"))
        return len(self.kept[project])

    def compare(self, whole: Path, killed: Path) -> dict[str, object]:
        sides = [[json.loads(line) for line in (side / "eval/all.jsonl").open()] for side in (whole, killed)]
        names = ("id", "reference", "hypothesis", "heard", "seconds", "loop")
        same = [[[record[name] for name in names] for record in side] for side in sides]
        summaries = [json.loads((side / "eval/summary.json").read_text()) for side in (whole, killed)]
        for summary in summaries:
            summary["splits"]["all"].pop("speed")
        return {
            "equal": same[0] == same[1] and summaries[0] == summaries[1] and len(same[0]) == self.size,
            "largest_difference": max(abs(a["score"] - b["score"]) for a, b in zip(*sides, strict=True)),
            "decoded_again": len(self.kept[killed] - set((killed / "eval/all.jsonl").open("rb"))),
        }


@dataclass
class Caching:
    """Fills a cache of frames, and then trains a step."""

    folder: Path
    args: argparse.Namespace

    def __post_init__(self) -> None:
        self.size = 30 * self.args.kills
        self.flags = [*world(self.folder, self.args, self.size), "--epoch_count=1", "--epoch_steps=1"]

    def sign(self, project: Path) -> int:
        return sum(path.stat().st_size for path in (project / "frames").glob("*/*.index"))

    def reached(self, project: Path) -> int:
        return self.sign(project) // RECORD_BYTES // 2  # one for its content, one for its stamp

    def compare(self, whole: Path, killed: Path) -> dict[str, object]:
        recordings = [row.audio for row in read_manifest(self.folder / "train.jsonl")]
        sides = []
        for project in (whole, killed):
            cache = FrameCache(project / "frames", storage="fp16")
            cache.encoder(str(self.folder / "encoder"))
            sides.append([cache.read(recording)[0].float() for recording in recordings])
        same = [torch.equal(a, b) for a, b in zip(*sides, strict=True)]
        return {
            "equal": all(same),
            "largest_difference": max((a - b).abs().max().item() for a, b in zip(*sides, strict=True)),
        }


def world(folder: Path, args: argparse.Namespace, utterances: int = 24) -> list[str]:
    """The flags of a small world in a folder, with the language model that is asked for first."""
    load_model, *flags = write_world(folder, utterances=utterances, generation=7 if args.load_model == "rwkv7" else 6)
    return [load_model if args.load_model in ("rwkv6", "rwkv7") else f"--load_model={args.load_model}", *flags]


OPERATIONS = {"train": Training, "eval": Evaluation, "cache": Caching}


def start(project: Path, flags: list[str]) -> subprocess.Popen:
    program = project.parent / "program.py"  # a file, as other processes of the run are started from it
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), f"--proj_dir={project}", *flags]
    if "--op=eval" not in flags and "--epoch_steps=1" in flags:
        command.append(f"--cache_features={project / 'frames'}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log_of(project).open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def log_of(project: Path) -> Path:
    return project.parent / f"{project.name}.log"


def life(
    operation: Training | Evaluation | Caching, project: Path, work: float = float("inf"), delay: float = 0
) -> bool:
    """Starts the command and kills it so many seconds after it has done so much; whether it was killed."""
    sign, end = operation.sign(project), operation.reached(project) + work
    process = start(project, operation.flags)
    while process.poll() is None and (operation.sign(project) == sign or operation.reached(project) < end):
        time.sleep(0.01)
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    if process.returncode:
        raise SystemExit(log_of(project).read_text()[-2000:])
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operation", default="train", choices=OPERATIONS)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--load_model", default="rwkv6", help="rwkv6 or rwkv7, random and small, or a file")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps_per_kill", type=int, default=25)
    args = parser.parse_args()
    dice = random.Random(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        operation = OPERATIONS[args.operation](folder, args)
        operation.flags += [f"--devices={args.processes}", "--num_workers=0"]
        life(operation, folder / "whole")
        longest = LONGEST_LIFE * operation.size / args.kills
        project, torn, lives = folder / "killed", 0, [0]
        while len(lives) <= args.kills:
            if not life(operation, project, dice.uniform(0, longest), dice.uniform(0, MOMENT)):
                raise SystemExit(f"it ended after {len(lives) - 1} kills: give it more to do, or another --seed")
            torn += any(project.rglob("*.part"))
            lives.append(operation.reached(project))
        life(operation, project)
        print(
            json.dumps(
                vars(args)
                | {
                    "kills": len(lives) - 1,
                    **operation.compare(folder / "whole", project),
                    "killed_while_writing": torn,
                    "reached": lives,
                    "of": operation.size,
                    "minutes": round((time.monotonic() - began) / 60, 1),
                }
            )
        )


if __name__ == "__main__":
    main()
