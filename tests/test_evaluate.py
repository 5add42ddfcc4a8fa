"""Evaluation from the flags on: in one process and two, interrupted and resumed, refused."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train as door
from rwkv_speech.errors import UserError
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops import OPS
from rwkv_speech.options import Options
from rwkv_speech.scoring import RecordWriter
from rwkv_speech.trained import write_mission_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def missions(world, tmp_path_factory):
    """Two that were never trained; each says something else of every recording."""
    folder, model = tmp_path_factory.mktemp("missions"), world.speech_rwkv(adapter_hidden=32)
    for seed in (0, 1):
        torch.manual_seed(seed)
        for block in model.language_model.blocks:
            torch.nn.init.normal_(block.att.time_state)
        write_mission_file(folder / f"{seed}.pth", model.trainable_state_dict(), model.describe(mission="transcribe"))
    return [folder / "0.pth", folder / "1.pth"]


@pytest.fixture(scope="module")
def flags(world, missions):
    """Of an evaluation that takes a second or two for its 24 utterances; `--adapter` can be given anew behind them."""
    return [
        "--op=eval",
        *world.flags,
        f"--adapter={missions[0]}",
        "--num_workers=0",
        "--eval_bsz=1",
        "--max_new_tokens=50",
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The project of an evaluation without interruption, in this process."""
    project = tmp_path_factory.mktemp("whole")
    here(flags, project)
    return project


def here(flags, project, *more):
    options = Options.parse([*flags, f"--proj_dir={project}", *more])
    assert OPS["eval"](options) == 0


def start(flags, project, *more):
    command = [sys.executable, str(ROOT / "train.py"), *flags, f"--proj_dir={project}", *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def end(process):
    """The lines of its standard error, once it and all that it started have ended."""
    _, errors = process.communicate(timeout=300)  # the pipe closes with the last of them
    return errors.splitlines()


def results(project):
    """The summary without what hangs on the moment, and hypothesis and score by id."""
    summary = json.loads((project / "eval" / "summary.json").read_text())
    [split.pop("speed") for split in summary["splits"].values()]
    records = [json.loads(line) for line in (project / "eval" / "all.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return summary, {r["id"]: (r["hypothesis"], pytest.approx(r["score"], abs=1e-4)) for r in records}


def unfinished(project):
    """The whole lines in what each process has written."""
    files = sorted((project / "eval" / "unfinished" / "all").glob("*.jsonl"))
    return [file.read_bytes().splitlines(keepends=True) for file in files]


def test_two_processes_killed_and_resumed_end_as_one_that_was_not(flags, whole, tmp_path):
    chance = random.Random()
    running = start(flags, tmp_path, "--devices=2")
    enough = chance.randint(1, 10)
    while len(shares := unfinished(tmp_path)) < 2 or sum(map(len, shares)) < enough:
        assert running.poll() is None, end(running)
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    end(running)
    written = [line for lines in unfinished(tmp_path) for line in lines if line.endswith(b"\n")]
    assert enough <= len(written) < 24, "the case is void: nothing was left to do"
    assert len({json.loads(line)["id"] for line in written}) == len(written)
    for path in (tmp_path / "eval" / "unfinished" / "all").iterdir():
        with path.open("ab") as file:
            file.write(written[0][: chance.randint(1, len(written[0]) - 1)])

    resumed = start(flags, tmp_path, "--devices=2", "--resume")
    errors = end(resumed)
    assert resumed.returncode == 0, errors
    assert results(tmp_path) == results(whole)
    lines = (tmp_path / "eval" / "all.jsonl").read_bytes().splitlines(keepends=True)
    assert set(written) < set(lines), "with the seconds of the first time: they were not decoded again"
    assert sum(line.startswith("computing on") for line in errors) == 1
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == sorted(p.name for p in (whole / "eval").iterdir())


def test_a_claim_that_fails_in_the_first_of_two_ends_both(flags, whole):
    before = results(whole)
    refused = start(flags, whole, "--devices=2", "--resume", "--max_new_tokens=7")
    errors = [line for line in end(refused) if line.startswith(("train.py", "Traceback"))]
    assert refused.returncode == 2
    (line,) = errors
    assert "max_new_tokens was 50, is 7; leave --resume out" in line
    assert results(whole) == before


def test_a_bad_recording_in_the_second_of_two_ends_both(world, flags, tmp_path):
    manifest = tmp_path / "bad.jsonl"
    lines = [
        {"audio": str(path if i != 3 else tmp_path / "missing.wav"), "text": text}
        for i, (path, text) in enumerate(world.utterances)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stopped = start(flags, tmp_path, "--devices=2", f"--data={manifest}")
    errors = end(stopped)
    assert stopped.returncode in (2, -signal.SIGKILL)
    (line,) = [line for line in errors if line.startswith(("train.py", "Traceback", "[rank"))]
    assert "missing.wav" in line

    here(flags, tmp_path, f"--data={manifest}", "--resume", "--on_bad_audio=skip")  # in one process now
    summary, records = results(tmp_path)
    assert (len(records), summary["splits"]["all"]["utterances"], summary["splits"]["all"]["left_out"]) == (23, 23, 1)


class PowerCutError(Exception):
    pass


@pytest.fixture
def cut_power(monkeypatch):
    """cut_power(n): the n-th batch of this process from then on fails."""
    plain = SpeechRWKV.decode

    def cut(number):
        batches = []

        def decode(self, *args, **how):
            batches.append(1)
            if len(batches) == number:
                raise PowerCutError
            return plain(self, *args, **how)

        monkeypatch.setattr(SpeechRWKV, "decode", decode)

    return cut


def test_what_another_evaluation_left_counts_for_nothing(flags, missions, tmp_path, cut_power):
    other = [*flags, f"--adapter={missions[1]}"]
    here(flags, tmp_path)  # finished, with one mission
    cut_power(5)
    with pytest.raises(PowerCutError):
        here(other, tmp_path)  # and overwritten, but not to its end, with another
    cut_power(100)
    here(other, tmp_path, "--resume")
    here(other, tmp_path / "fresh")
    assert results(tmp_path) == results(tmp_path / "fresh")


def test_a_full_disk_is_one_line_and_what_was_done_is_kept(flags, whole, tmp_path, monkeypatch, capsys):
    plain, room = RecordWriter.write, iter(range(5))

    def write(self, record):
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, record)

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, f"--proj_dir={tmp_path}"])
    assert door.main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert str(tmp_path / "eval") in line
    assert "no space left on the disk" in line
    assert "--resume" in line
    assert [len(lines) for lines in unfinished(tmp_path)] == [5]

    monkeypatch.setattr(RecordWriter, "write", plain)
    here(flags, tmp_path, "--resume")
    assert results(tmp_path) == results(whole)


def test_a_finished_evaluation_is_not_done_again_but_changed_texts_are(world, flags, tmp_path, cut_power):
    here(flags, tmp_path)
    before = results(tmp_path)
    cut_power(1)
    here(flags, tmp_path, "--resume")
    assert results(tmp_path) == before
    cut_power(2)
    text = (world.folder / "train.jsonl").read_text()
    changed = tmp_path / "changed" / "all.jsonl"
    changed.parent.mkdir()
    lines = [json.loads(line) for line in text.splitlines()]
    lines = [line | {"audio": str(world.folder / line["audio"])} for line in lines]
    lines[7]["text"] = "another transcript"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    here(flags, tmp_path, "--resume", f"--eval_split={changed}")
    summary, _ = results(tmp_path)
    assert summary["splits"][str(changed)]["utterances"] == 24


def test_perturbed_rows_resume_where_they_stopped(flags, tmp_path, cut_power):
    cut_power(24 * 3 + 10)
    with pytest.raises(PowerCutError):
        here(flags, tmp_path, "--perturb", "--max_new_tokens=5")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "eval").glob("*.jsonl")}
    assert len(finished) == 3
    cut_power(24 * 2 + 15 + 1)  # one batch more than are left
    here(flags, tmp_path, "--perturb", "--max_new_tokens=5", "--resume")
    cut_power(1000)
    here(flags, tmp_path / "fresh", "--perturb", "--max_new_tokens=5")
    assert results(tmp_path) == results(tmp_path / "fresh")
    assert len(results(tmp_path)[0]["splits"]) == 6


def test_mistakes_are_told_before_any_work(world, flags, tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"audio": "a.wav", "text": "a", "id": "x"}\n{"audio": "b.wav", "text": "b", "id": "x"}\n')
    with pytest.raises(UserError, match="'x' occurs 2 times"):
        here(flags, tmp_path, f"--data={twice}")
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        (folder / "dev.jsonl").write_text('{"audio": "a.wav", "text": "a"}\n')
    with pytest.raises(UserError, match=r"two of the splits would go to eval/dev\.jsonl"):
        here(flags, tmp_path, f"--eval_split={tmp_path}/dev.jsonl+{tmp_path}/other/dev.jsonl")
    assert not (tmp_path / "eval").exists()
