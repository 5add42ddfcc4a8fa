"""Mangled input of every sort, and what the program makes of it.

Nothing may hang, die, print a traceback or take much memory; and what is mangled is either used or named.
"""

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.sources import load_split
from rwkv_speech.errors import UserError
from rwkv_speech.files import printable
from rwkv_speech.speech.frame_cache import FrameCache
from rwkv_speech.speech.recording import Recording
from tests.mangling.audio import mangled_audio
from tests.mangling.tables import mangled_tables
from tests.mangling.weights import SPRUNG, mangled_encoders, mangled_missions, mangled_models
from tests.one_process import OneProcess, Outcome
from tests.tiny import write_world

# Of 100 cases; audio comes in manifests of some.
SHARES = {"audio": 40, "table": 36, "model": 10, "mission": 8, "encoder": 6}
TOGETHER = 8  # recordings in a manifest of mangled ones
BAD = "bad_audio.jsonl"  # where all that can't be used is named, one by one
SECONDS, BYTES = 20.0, 2.5e9  # that a run may take


@dataclass
class Trial:
    """What came of it.

    cases, runs: mangled things, and runs of the program.
    used, named: recordings, over all runs on mangled ones, and
    refused: runs that ended with a line that names what is mangled.
    problems: a line for each.
    slowest: seconds that a run took at most; peak: bytes.
    """

    cases: int = 0
    runs: int = 0
    used: int = 0
    named: int = 0
    refused: int = 0
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak: int = 0

    def note(self, where: str, problems: Sequence[str]) -> None:
        for problem in problems:
            self.problems.append(f"{where}: {problem}")
            print(self.problems[-1], file=sys.stderr, flush=True)  # a trial takes long


@dataclass(frozen=True)
class Case:
    """Something mangled, and how it is given to the program.

    what: what was done to it, and where it lies.
    size: how many mangled things that is.
    names: what a line that refuses it says, one of them.
    flags: that give it to any operation.
    files: for prediction; none: it isn't for that.
    partly: whether whole recordings are among it, so that nothing may be refused altogether.
    marker: a file that must not come into being.
    """

    what: str
    names: Sequence[str]
    flags: Mapping[str, str]
    files: Sequence[str] = ()
    size: int = 1
    partly: bool = False
    marker: Path | None = None


def try_all(folder: Path, *, count: int, seed: int, every_operation: bool) -> Trial:
    """Makes about `count` mangled things in a folder, and runs the program over them.

    every_operation: all that a thing can be given to; else one of them for each.
    """
    trial = Trial()
    runs = _Runs(folder / "world", trial)
    rng = random.Random(seed)
    for kind, share in SHARES.items():
        for case in _cases(kind, folder / kind, runs, rng, max(1, round(count * share / 100))):
            operations = [runs.train, runs.evaluate, runs.train_cached, *([runs.predict] if case.files else [])]
            # What an operation makes of a recording: whether it is used, or why not.
            found = [operation(case) for operation in (operations if every_operation else [rng.choice(operations)])]
            trial.cases += case.size
            trial.note(f"all operations, {case.what}", disagreements(found))
    runs.process.close()
    return trial


# --- mangled things ---


def _cases(kind: str, folder: Path, runs: "_Runs", rng: random.Random, count: int) -> Iterator[Case]:
    if kind == "audio":
        paths = list(mangled_audio(folder, np.random.default_rng(rng.randrange(2**32)), count))
        for first in range(0, count, TOGETHER):
            some = [str(path) for path in paths[first : first + TOGETHER]]
            manifest = folder / f"train-{first}.jsonl"
            lines = [{"audio": path, "text": "ab"} for path in [*runs.good, *some]]
            manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
            what = f"audio {printable(some[0])} to {printable(some[-1])}"
            # A folder, for prediction, is the recordings in it, and one without any is refused before all work.
            files = [path for path in (*runs.good, *some) if not os.path.isdir(path)]
            yield Case(what, (), {"data": str(manifest)}, files, len(some), partly=True)
    elif kind == "table":
        for number, (what, path) in enumerate(mangled_tables(folder, rng, count)):
            yield Case(f"{what} {path}", (f"case-{number}", BAD), {"data": str(path)})
    else:
        mangle, flag, whole = {
            "model": (mangled_models, "load_model", runs.flags["load_model"]),
            "mission": (mangled_missions, "adapter", runs.flags["adapter"]),
            "encoder": (mangled_encoders, "encoder", runs.flags["encoder"]),
        }[kind]
        folder.mkdir()
        for path, what in mangle(Path(whole), folder, np.random.default_rng(rng.randrange(2**32)), count):
            yield Case(f"{what} {path}", (path.stem, BAD), {flag: str(path)}, runs.good[:1], marker=folder / SPRUNG)


# --- runs ---

Found = dict[str, str | None]
"""Recordings, by the names that all operations call them by: why each was not used, or None where it was."""


class _Runs:
    """Runs of the program in one small world."""

    def __init__(self, folder: Path, trial: Trial) -> None:
        self.folder, self.trial = folder, trial
        folder.mkdir(parents=True, exist_ok=True)
        flags = write_world(folder, utterances=4)
        self.flags = dict(flag[2:].split("=", 1) for flag in flags) | {"num_workers": "0"}
        self.process = OneProcess(limit_s=SECONDS, limit_bytes=BYTES)
        self.good = [str(folder / f"{i}.wav") for i in range(4)]
        self.number = 0
        mission = folder / "mission"
        self._run("train", mission, {"epoch_count": "1"})
        self.flags["adapter"] = str(next(mission.glob("*.pth")))

    def train(self, case: Case) -> Found:
        return self._learn(case, "training")

    def train_cached(self, case: Case) -> Found:
        folder = self.folder / f"frames-{self.number}"
        found = self._learn(case, "training from cached frames", cache_features=str(folder))
        problem = cached_frames(folder, case.flags.get("encoder", self.flags["encoder"]), found)
        shutil.rmtree(folder, ignore_errors=True)
        return self._noted(case, "training from cached frames", found, problem)

    def evaluate(self, case: Case) -> Found:
        outcome, project = self._do("eval", "evaluation", case, {"max_new_tokens": "2"})
        records = (json.loads(line) for path in project.glob("eval/*.jsonl") for line in path.open())
        return self._found(case, "evaluation", outcome, project, [record["id"] for record in records])

    def predict(self, case: Case) -> Found:
        settings = {"max_new_tokens": "2", "format": "json"}
        outcome, _ = self._do("predict", "prediction", case, settings, case.files)
        if outcome.status not in (0, 1):
            return {}
        found, problems = predicted(outcome, list(map(printable, case.files)))
        return self._noted(case, "prediction", found, problems)

    def _learn(self, case: Case, name: str, **more: str) -> Found:
        outcome, project = self._do("train", name, case, {"epoch_count": "1", "save_steps": "0"} | more)
        return self._found(case, name, outcome, project, outcome.learnt)

    def _found(self, case: Case, name: str, outcome: Outcome, project: Path, used: Sequence[str]) -> Found:
        """What a run over rows of data says of each."""
        if outcome.status != 0 and BAD not in _last(outcome):
            return {}
        listed = project / BAD
        bad = [json.loads(line) for line in listed.open()] if listed.exists() else []
        unpaired = BadSamples("skip", self.folder / "unpaired.jsonl")  # recordings without a text, which are no rows
        rows = load_split(None, data=case.flags.get("data", self.flags["data"]), bad_audio=unpaired)
        found, problems = accounted([row.id for row in rows], used, {entry["id"]: entry["reason"] for entry in bad})
        return self._noted(case, name, found, problems)

    def _noted(self, case: Case, name: str, found: Found, problems: Sequence[str]) -> Found:
        self.trial.note(f"{name}, {case.what}", problems)
        self.trial.used += sum(why is None for why in found.values())
        self.trial.named += sum(why is not None for why in found.values())
        return found

    def _do(
        self, op: str, name: str, case: Case, settings: Mapping[str, str], files: Sequence[str] = ()
    ) -> tuple[Outcome, Path]:
        project = self.folder / "runs" / str(self.number)
        outcome = self._run(op, project, {**settings, **case.flags}, files)
        allowed = {0, *((1,) if op == "predict" else ()), *(() if case.partly else (2,))}
        problems = misbehaviour(outcome, allowed, case.names)
        if case.marker and case.marker.exists():
            case.marker.unlink()
            problems.append("code of a weight file was run")
        self._noted(case, name, {}, problems)
        self.trial.refused += outcome.status == 2
        return outcome, project

    def _run(self, op: str, project: Path, settings: Mapping[str, str], files: Sequence[str] = ()) -> Outcome:
        self.number += 1
        flags = self.flags | ({"warmup_steps": "0"} if op == "train" else {}) | settings
        if op != "predict":
            flags |= {"on_bad_audio": "skip"}
        given = [f"--op={op}", f"--proj_dir={project}", *(f"--{name}={value}" for name, value in flags.items())]
        outcome = self.process.run(*given, *(["--file_path", *files] if files else []))
        self.trial.runs += 1
        self.trial.slowest = max(self.trial.slowest, outcome.seconds)
        self.trial.peak = max(self.trial.peak, outcome.peak)
        return outcome


# --- checks: lines that say what is wrong ---


def misbehaviour(outcome: Outcome, allowed: set[int], names: Sequence[str]) -> list[str]:
    """allowed: exit statuses; names: of which the line that goes with status 2 says one."""
    said = outcome.stdout + outcome.stderr
    last = _last(outcome)
    problems = []
    if outcome.status is None:
        problems.append(f"{outcome.end}; {last}")
    elif outcome.status not in allowed:
        problems.append(f"exit status {outcome.status}; {last}")
    elif outcome.status == 2 and not last.startswith("train.py: "):
        problems.append(f"ends without a line that says why; {last}")
    elif outcome.status == 2 and not any(name in last for name in names):
        problems.append(f"ends with a line that does not name it; {last}")
    if "Traceback (most recent call last)" in said:
        problems.append(f"a traceback; {last}")
    if "weights_only=False" in said:
        problems.append("advises to read weights as code")
    return problems


def accounted(rows: Sequence[str], used: Sequence[str], bad: Mapping[str, str]) -> tuple[Found, list[str]]:
    """rows, used: ids; bad: id -> why it was not used."""
    problems = [f"{id} was neither used nor named" for id in rows if id not in used and id not in bad]
    problems += [f"{id} was named as bad, and used" for id in used if id in bad and rows.count(id) == 1]
    problems += [f"{id} was used {used.count(id)} times" for id in {*used} if used.count(id) > rows.count(id)]
    problems += [f"{id} has no reason in one line" for id, why in bad.items() if not why.strip() or "\n" in why]
    return {id: bad.get(id) for id in rows}, problems


def predicted(outcome: Outcome, names: Sequence[str]) -> tuple[Found, list[str]]:
    """names: as messages have them."""
    used = [json.loads(line)["name"] for line in outcome.stdout.splitlines()]
    # A line that names a file may be a warning only.
    bad = {name: line for line in outcome.stderr.splitlines() for name in names if f"{name}: " in line}
    found, problems = accounted(names, used, {name: why for name, why in bad.items() if name not in used})
    if outcome.status != int(len(used) < len(names)):
        problems.append(f"exit status {outcome.status}, with {len(used)} of {len(names)} files used")
    return found, problems


def cached_frames(folder: Path, encoder: str, found: Found) -> list[str]:
    """Of what was used, all frames are there."""
    used = [name for name, why in found.items() if why is None and Path(name).is_absolute()]
    if not used:
        return []
    cache = FrameCache(folder, storage="fp16")
    cache.encoder(encoder)
    problems = []
    for name in used:
        try:
            frames, _ = cache.read(Recording(Path(name)))
        except UserError as error:
            problems.append(f"{name} was used, but its frames are not there: {error}")
        else:
            if not len(frames) or not torch.isfinite(frames).all():
                problems.append(f"{name}: its frames are none")
    return problems


def disagreements(found: Sequence[Found]) -> list[str]:
    """Recordings that one operation uses and another one refuses, for any other reason than those of training."""
    reasons: dict[str, list[str | None]] = {}
    for one in found:
        for name, why in one.items():
            reasons.setdefault(name, []).append(why)
    of_training = re.compile("more than|text with no tokens")
    refused = {name: [why for why in all if why and not of_training.search(why)] for name, all in reasons.items()}
    return [
        f"{name} is used, and refused: {refused[name][0]}"
        for name in refused
        if None in reasons[name] and refused[name]
    ]


def _last(outcome: Outcome) -> str:
    """The last line on standard error."""
    return (outcome.stderr.strip().splitlines() or [""])[-1]
