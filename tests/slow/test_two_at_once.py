"""Two operations in one project, started within 100 ms of each other: never a wrong figure, never a lost file.

python -m pytest tests/slow/test_two_at_once.py          (half an hour; the environment may set fewer TRIALS)

Last result, 20 trials of each pair: of two evaluations the one that ended had the figures of one alone; of two
trainings of different seeds one was refused each time, 11 times the first one and 9 times the second, and the other
had the weights of its seed, bit for bit; training beside evaluation, five times in two processes: both were right.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from rwkv_speech.mission_file import write_mission_file
from tests.tiny import answers

ROOT = Path(__file__).parents[2]
TRIALS = int(os.environ.get("TRIALS", 20))
TRAIN = ["--epoch_count=2", "--save_steps=1", "--warmup_steps=0", "--lr_init=1e-2", "--num_workers=0"]
EVAL = ["--op=eval", "--eval_bsz=2", "--max_new_tokens=20", "--max_audio_s=30", "--num_workers=0"]


def start(world, project, *flags):
    command = [sys.executable, str(ROOT / "train.py"), *world.flags, f"--proj_dir={project}", *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def both(world, project, one, other, chance):
    """Exit status and standard error of two, started within 100 ms."""
    processes = [start(world, project, *one)]
    time.sleep(chance.uniform(0, 0.1))
    processes.append(start(world, project, *other))
    return [(process.communicate(timeout=600)[1], process.returncode)[::-1] for process in processes]


def alone(world, project, *flags):
    process = start(world, project, *flags)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    return project


def survivor(ended, operation):
    """Which of two came to its end: one at least, and the other did or was told who is there."""
    statuses = [status for status, _ in ended]
    assert set(statuses) <= {0, 2}, [err[-2000:] for _, err in ended]
    assert 0 in statuses
    for status, err in ended:
        assert "Traceback" not in err
        if status == 2:
            (line,) = [line for line in err.splitlines() if line.startswith("train.py: ")]
            assert f"is in use: {operation} by process" in line
    return statuses.index(0)


def same(one, other):
    """Whether two mission files hold the same weights, bit for bit."""
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def evaluated(project):
    """Ids and hypotheses, and the counts and scores of the summary."""
    records = [json.loads(line) for line in (project / "eval/all.jsonl").read_text().splitlines()]
    summary = json.loads((project / "eval/summary.json").read_text())
    summary["splits"]["all"].pop("speed")
    assert (summary["splits"]["all"]["utterances"], summary["splits"]["all"]["left_out"]) == (24, 0)
    assert not [
        path for path in project.rglob("*") if path.name.endswith((".part", ".lock")) or path.name == "unfinished"
    ]
    return [(record["id"], record["hypothesis"]) for record in records], summary["splits"], summary["adapter"]


@pytest.fixture(scope="module")
def untrained(world, tmp_path_factory):
    """A mission file whose answers differ from recording to recording."""
    path, model = tmp_path_factory.mktemp("untrained") / "m.pth", world.speech_rwkv(adapter_hidden=32)
    torch.manual_seed(0)
    for block in model.language_model.blocks:
        torch.nn.init.normal_(block.att.time_state)
    write_mission_file(path, model.trainable_state_dict(), model.describe(mission="transcribe"))
    return path


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Seed -> a project that was trained alone, with the mission file of each of its 12 steps."""
    folder = tmp_path_factory.mktemp("alone")
    return {seed: alone(world, folder / str(seed), *TRAIN, f"--random_seed={seed}", "--average=12") for seed in (1, 2)}


def test_two_evaluations(world, untrained, tmp_path):
    chance = random.Random(1)
    flags = [*EVAL, f"--adapter={untrained}"]
    truth = evaluated(alone(world, tmp_path / "alone", *flags))
    model = world.speech_rwkv(adapter=untrained)
    texts = answers(model, [path for path, _ in world.utterances], max_new_tokens=20)
    assert [text for _, text in truth[0]] == texts
    assert len(set(texts)) > 5, "the case is void"
    for trial in range(TRIALS):
        project = tmp_path / str(trial)
        survivor(both(world, project, flags, [*flags, "--resume"] if trial % 2 else flags, chance), "evaluation")
        assert evaluated(project) == truth


def test_two_trainings(world, trained, tmp_path):
    """Of two seeds, as nothing else tells whose weights they are."""
    chance, ends = random.Random(2), Counter()
    for trial in range(TRIALS):
        project = tmp_path / str(trial)
        ended = both(world, project, *([*TRAIN, f"--random_seed={seed}"] for seed in (1, 2)), chance)
        first = survivor(ended, "training") + 1
        statuses = tuple(status for status, _ in ended)
        ends[statuses] += 1
        if trial == 0 and 2 in statuses:  # the one that was refused does not go on with the other's
            alone(world, project, *TRAIN, f"--random_seed={3 - first}")
            statuses = (0, 0)
        files = sorted(path.name for path in project.glob("rwkv-adapter-12*.pth"))
        assert files == ["rwkv-adapter-12-run2.pth", "rwkv-adapter-12.pth"][statuses.count(2) :]
        seeds = [
            seed for seed in (1, 2) for file in files if same(project / file, trained[seed] / "rwkv-adapter-12.pth")
        ]
        assert seeds == ([first] if 2 in statuses else [1, 2])
    print("exit statuses of seeds 1 and 2:", dict(ends))


def test_training_beside_evaluation(world, trained, tmp_path):
    """Both are right, though training writes and removes mission files all the while; also with two processes."""
    chance, steps, truths = random.Random(3), [], {}
    for trial in range(TRIALS):
        project = tmp_path / str(trial)
        alone(world, project, *TRAIN, "--random_seed=2", "--epoch_count=1", "--epoch_steps=1")  # something to evaluate
        more = ["--devices=2"] if trial % 4 == 3 else []
        ended = both(world, project, [*TRAIN, "--random_seed=1"], [*EVAL, *more], chance)
        assert [status for status, _ in ended] == [0, 0], [err[-2000:] for _, err in ended]
        assert same(project / "rwkv-adapter-12.pth", trained[1] / "rwkv-adapter-12.pth")
        said, _, adapter = evaluated(project)
        name = Path(adapter).name
        # The first run has the file of its step 1, under which name the second one's comes with its number.
        source = (trained[2] if name == "rwkv-adapter-1.pth" else trained[1]) / name.replace("-run2", "")
        if source not in truths:
            model = world.speech_rwkv(adapter=source)
            truths[source] = answers(model, [path for path, _ in world.utterances], max_new_tokens=20)
        assert [text for _, text in said] == truths[source]
        steps.append(name)
    print("evaluated:", steps)
