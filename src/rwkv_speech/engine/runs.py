"""One training run and its place on disk: what it was asked, how far it came, and whether to go on with it."""

import json
import logging
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_speech.files import write_whole
from rwkv_speech.options import Options

log = logging.getLogger("rwkv_speech")

# Options that change nothing in what is learned, or only in what comes: a run may go on under other ones.
_FREE = {
    *("num_workers", "wandb", "wkv", "eval_split", "eval_bsz", "beam", "max_new_tokens", "loop_guard", "resume"),
    *("valid_split", "valid_steps", "early_stop", "average", "on_nonfinite", "on_bad_audio"),
}


@dataclass(frozen=True)
class Run:
    """A training run.

    number: 1 for the first in a project.
    folder: `checkpoints/run-<number>` in the project, where it keeps its resume point.
    asked: the options that decide what it learns.
    id: a random name, by which it knows its own files again.
    resume_point: the checkpoint to go on from, or None for a new run.
    """

    number: int
    folder: Path
    asked: dict[str, Any]
    id: str
    resume_point: Path | None = None

    def begin(self) -> None:
        """Takes the folder. Only one process of a run does this, after all have found their run."""
        self._write(finished=False)

    def finish(self) -> None:
        """Marks the run as done: the same command starts a new one."""
        self._write(finished=True)

    def _write(self, *, finished: bool) -> None:
        content = {"finished": finished, "id": self.id, "options": self.asked}
        write_whole(self.folder / "run.json", (json.dumps(content, indent=2) + "\n").encode())


def find_run(options: Options) -> Run:
    """The newest run of the project where it is unfinished and was asked the same; else a new run."""
    asked = {name: value for name, value in asdict(options).items() if name not in _FREE}
    checkpoints = options.project / "checkpoints"
    folders = {int(path.name[4:]): path for path in checkpoints.glob("run-*") if path.name[4:].isdecimal()}
    number = max(folders, default=0)
    if number:
        folder = folders[number]
        points = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(r"step=(\d+)\.ckpt", p.name))}
        point = points[max(points)] if points else None
        try:
            before = {"id": "", **json.loads((folder / "run.json").read_text())}
        except (OSError, ValueError):
            before = {"finished": True, "id": "", "options": {}}
        if not before["finished"] and before["options"] == asked:
            log.info("going on with the unfinished run %d from %s", number, point or "its start")
            return Run(number, folder, asked, before["id"], point)
        changed = sorted(name for name in asked if before["options"].get(name) != asked[name])
        why = "is finished" if before["finished"] else f"had other {', '.join(changed)}"
        log.info("run %d in %s %s; this is run %d, and leaves its files alone", number, folder, why, number + 1)
    return Run(number + 1, checkpoints / f"run-{number + 1}", asked, secrets.token_hex(4))
