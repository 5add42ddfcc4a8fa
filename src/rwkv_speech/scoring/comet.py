"""COMET of translations, by the command `comet-score` of the package unbabel-comet, where that is on the PATH.

The package wants older libraries than this project, so it goes into an environment of its own (`pipx install
unbabel-comet`), which its command brings along.
"""

import json
import logging
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from rwkv_speech.scoring.records import EvalRecord

log = logging.getLogger("rwkv_speech")


def comet(records: Sequence[EvalRecord]) -> list[float] | None:
    """COMET of each record against its reference, by the command's default model; None, and a line why, without it."""
    program = shutil.which("comet-score")
    if not program:
        return _left_out("it needs the command comet-score: pipx install unbabel-comet")
    sources = [record.details.get("transcript") for record in records]
    if None in sources:
        return _left_out("it compares with what was said, and some rows have no 'transcript'")
    with TemporaryDirectory() as folder:
        command, scores = [program], Path(folder) / "scores.json"
        texts = {
            "--sources": sources,
            "--translations": [record.hypothesis for record in records],
            "--references": [record.reference for record in records],
        }
        for flag, lines in texts.items():
            path = Path(folder) / flag.strip("-")
            path.write_text("".join(" ".join(line.split()) + "\n" for line in lines), encoding="utf-8")
            command += [flag, str(path)]
        command += ["--quiet", "--only_system", "--to_json", str(scores)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not scores.exists():
            said = done.stderr.strip().splitlines() or ["nothing"]
            return _left_out(f"comet-score ended with status {done.returncode} and says {said[-1]}")
        (found,) = json.loads(scores.read_text(encoding="utf-8")).values()
    return [line["COMET"] for line in found]


@cache  # once is enough
def _left_out(why: str) -> None:
    log.info("COMET is left out: %s", why)
