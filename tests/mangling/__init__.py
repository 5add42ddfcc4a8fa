"""Mangled input of every sort, and what the program makes of it.

Nothing may hang, die, print a traceback or take much memory; and what is mangled is either used or named.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from tests.mangling.audio import mangled_audio
from tests.mangling.tables import mangled_tables
from tests.mangling.weights import SPRUNG, mangled_encoders, mangled_missions, mangled_models
from tests.one_process import OneProcess, Outcome
from tests.tiny import write_world

# Of 100 cases; audio comes in manifests of some.
SHARES = {"audio": 40, "table": 36, "model": 10, "mission": 8, "encoder": 6}
TOGETHER = 8  # recordings in a manifest of mangled ones
MEMORY = 2.5e9  # bytes


@dataclass
class Trial:
    """What came of it.

    cases, runs: mangled things, and runs of the program.
    problems: a line for each.
    slowest: seconds that a run took at most; peak: bytes.
    """

    cases: int = 0
    runs: int = 0
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak: int = 0


class _Runs:
    """Runs of the program in one small world."""

    def __init__(self, folder: Path, trial: Trial) -> None:
        self.folder, self.trial = folder, trial
        folder.mkdir(parents=True, exist_ok=True)
        flags = write_world(folder, utterances=4)
        self.flags = dict(flag[2:].split("=", 1) for flag in flags) | {"num_workers": "0", "warmup_steps": "0"}
        self.process = OneProcess()
        self.good = [str(folder / f"{i}.wav") for i in range(4)]
        self.number = 0
        self.mission = self.folder / "mission"
        self._run("train", proj_dir=str(self.mission), epoch_count="1", epoch_steps="1")
        self.adapter = str(next(self.mission.glob("*.pth")))

    def train(self, what: str, names: Sequence[str], **changes: str) -> None:
        settings = {"epoch_count": "1", "epoch_steps": "1", "on_bad_audio": "skip", "save_steps": "0"}
        self._check(f"train {what}", names, self._run("train", **settings | changes))

    def evaluate(self, what: str, names: Sequence[str], **changes: str) -> None:
        settings = {"adapter": self.adapter, "on_bad_audio": "skip", "max_new_tokens": "2"}
        self._check(f"eval {what}", names, self._run("eval", **settings | changes))

    def predict(self, what: str, names: Sequence[str], *files: str, **changes: str) -> None:
        settings = {"adapter": self.adapter, "max_new_tokens": "2", "format": "json"}
        outcome = self._run("predict", *files, **settings | changes)
        self._check(f"predict {what}", names, outcome)
        told = outcome.stdout.count("\n")
        for path in files:
            name = Path(path).name
            if outcome.status is not None and told < len(files) and not _named(outcome, [name, path]):
                used = any(json.loads(line).get("audio", "").endswith(name) for line in outcome.stdout.splitlines())
                if not used:
                    self.trial.problems.append(f"predict {what}: {name} was neither used nor named")

    def _run(self, op: str, *files: str, proj_dir: str | None = None, **settings: str) -> Outcome:
        self.number += 1
        flags = {k: v for k, v in (self.flags | settings).items() if op == "train" or k != "warmup_steps"}
        place = proj_dir or str(self.folder / "runs" / str(self.number))
        given = [f"--op={op}", f"--proj_dir={place}", *(f"--{name}={value}" for name, value in flags.items())]
        outcome = self.process.run(*given, *(["--file_path", *files] if files else []))
        self.trial.runs += 1
        self.trial.slowest = max(self.trial.slowest, outcome.seconds)
        return outcome

    def _check(self, what: str, names: Sequence[str], outcome: Outcome) -> None:
        end = outcome.stderr.strip().splitlines()[-1:] or [""]
        problem = None
        if outcome.status is None:
            problem = "hangs or dies"
        elif "Traceback (most recent call last)" in outcome.stderr:
            problem = f"a traceback, {end[0]}"
        elif outcome.status not in (0, 1, 2):
            problem = f"exit status {outcome.status}, {end[0]}"
        elif outcome.status and not _named(outcome, names):
            problem = f"exit status {outcome.status}, which names nothing: {end[0]}"
        elif "weights_only=False" in outcome.stderr:
            problem = "advises to read weights as code"
        if problem:
            self.trial.problems.append(f"{what}: {problem}")


def _named(outcome: Outcome, names: Sequence[str]) -> bool:
    said = outcome.stderr + outcome.stdout
    return any(name in said for name in names)


def try_all(folder: Path, *, count: int, seed: int, every_operation: bool) -> Trial:
    """Makes about `count` mangled things in a folder, and runs the program over them.

    every_operation: all that a thing can be given to; else one of them for each.
    """
    trial = Trial()
    runs = _Runs(folder / "world", trial)
    rng = random.Random(seed)
    for kind, share in SHARES.items():
        number = max(1, round(count * share / 100))
        for operations, things in _cases(kind, folder / kind, runs, rng, number):
            trial.cases += things
            for operation in operations if every_operation else [rng.choice(operations)]:
                operation()
    runs.process.close()
    trial.peak = runs.process.peak
    if trial.peak > MEMORY:
        trial.problems.append(f"{trial.peak / 1e9:.2f} GB of memory")
    return trial


Case = tuple[list[Callable[[], None]], int]
"""What it can be given to, and how many mangled things it is."""


def _cases(kind: str, folder: Path, runs: _Runs, rng: random.Random, count: int) -> Iterator[Case]:
    if kind == "audio":
        yield from _audio_cases(folder, runs, rng, count)
    elif kind == "table":
        for number, (what, path) in enumerate(mangled_tables(folder, rng, count)):
            names, where = [path.name, f"case-{number}"], f"{what} {path}"
            yield (
                [
                    partial(runs.train, where, names, data=str(path)),
                    partial(runs.evaluate, where, names, data=str(path)),
                ],
                1,
            )
    else:
        mangle, flag, whole = {
            "model": (mangled_models, "load_model", runs.flags["load_model"]),
            "mission": (mangled_missions, "adapter", runs.adapter),
            "encoder": (mangled_encoders, "encoder", runs.flags["encoder"]),
        }[kind]
        folder.mkdir()
        for path, what in mangle(Path(whole), folder, np.random.default_rng(rng.randrange(2**32)), count):
            names, where, how = [path.stem], f"{what} {path}", {flag: str(path)}
            yield (
                [
                    partial(runs.predict, where, names, runs.good[0], **how),
                    partial(runs.train, where, names, **how),
                    partial(runs.evaluate, where, names, **how),
                ],
                1,
            )
            if (folder / SPRUNG).exists():
                (folder / SPRUNG).unlink()
                runs.trial.problems.append(f"{where}: code of a weight file was run")


def _audio_cases(folder: Path, runs: _Runs, rng: random.Random, count: int) -> Iterator[Case]:
    paths = list(mangled_audio(folder, np.random.default_rng(rng.randrange(2**32)), count))
    for first in range(0, count, TOGETHER):
        some = paths[first : first + TOGETHER]
        manifest = folder / f"train-{first}.jsonl"
        lines = [{"audio": path, "text": "ab"} for path in [*runs.good, *map(str, some)]]
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        names, what = [path.name for path in some], f"audio {some[0]} to {some[-1].name}"
        yield (
            [
                partial(runs.predict, what, names, *map(str, some)),
                partial(runs.train, what, names, data=str(manifest)),
                partial(runs.evaluate, what, names, data=str(manifest)),
                partial(
                    runs.train,
                    f"cached {what}",
                    names,
                    data=str(manifest),
                    cache_features=str(folder / f"frames-{first}"),
                ),
            ],
            len(some),
        )
