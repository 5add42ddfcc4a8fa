"""bench/gpu.sh where there is no GPU: every part in tiny sizes, and what becomes of a part that hangs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.gpu import drive
from bench.gpu.common import Run
from bench.gpu.run import PARTS

ROOT = Path(__file__).parents[1]


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def statuses(folder: Path) -> dict[str, str]:
    return {line["part"]: line["status"] for line in read(folder) if "status" in line}


def test_every_part_runs_on_a_cpu(tmp_path):
    out = tmp_path / "a folder"
    command = ["sh", str(ROOT / "bench" / "gpu.sh"), "--dry", "--out", str(out)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"python": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()[-5000:]
    assert statuses(out) == dict.fromkeys(
        (name for name in PARTS if not name.startswith(("warm-", "sanitized"))), "done"
    )
    checks = [line for line in read(out) if line.get("ok") is not None]
    assert len(checks) > 25
    assert all(line["ok"] for line in checks)
    assert not [line for line in read(out) if line.get("what") == "left out"]
    assert done.stdout.strip() == (out / "table.txt").read_text().strip()


def test_a_part_that_hangs_costs_only_its_own_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drive, "PHASES", ({"operator": 0.1}, {"wkv": 60}))
    monkeypatch.setattr(drive, "LEAST", 0.0)
    assert drive.main(["--dry", "--out", str(tmp_path)]) == 1
    assert statuses(tmp_path) == {"operator": "timed out", "wkv": "done"}
    assert "operator: timed out" in capsys.readouterr().out


def test_no_part_begins_when_the_time_is_over(tmp_path, capsys):
    assert drive.main(["--dry", "--out", str(tmp_path), "--seconds", "3"]) == 0
    assert set(statuses(tmp_path).values()) == {"skipped"}
    assert "3 s are over" in capsys.readouterr().out


def test_a_share_above_one_is_an_error_of_the_benchmark(tmp_path):
    run = Run("wkv", True, False, tmp_path / "results.jsonl", tmp_path, ROOT, "auto")
    run.record("right", **{"share of peak": 0.7})
    run.record("wrong", **{"share of peak": 1.1})
    right, wrong = read(tmp_path)
    assert right["ok"] is None
    assert wrong["ok"] is False
