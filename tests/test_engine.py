"""The engine: processes that agree, notices, full disks, losses that are none, validation, what a run leaves behind."""

import csv
import errno
import fcntl
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train as entry
from rwkv_speech.engine.callbacks import NonFiniteLosses
from rwkv_speech.engine.deepspeed import STAGES
from rwkv_speech.engine.lock import project_lock
from rwkv_speech.engine.machine import fit_to_machine
from rwkv_speech.engine.metrics import COLUMNS, MetricsFile, draw
from rwkv_speech.engine.mission_files import MissionFiles
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.engine.overview import POSITIONS, block_bytes
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_whole
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.rwkv6 import RWKV6
from rwkv_speech.lm.rwkv7 import RWKV7
from rwkv_speech.mission_file import write_mission_file
from rwkv_speech.missions import get_mission
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops import OPS
from rwkv_speech.options import MachineOptions, Options
from rwkv_speech.progress import Progress, hours
from rwkv_speech.scoring import EvalRecord
from rwkv_speech.trained import TrainedTensor

pytestmark = pytest.mark.usefixtures("voiced")

ROOT = Path(__file__).parents[1]
WER = get_mission("transcribe").leading
QUICK = ["--num_workers=0", "--warmup_steps=4", "--lr_init=1e-3", "--lr_final=1e-3"]


def train(world, project, *flags):
    return OPS["train"](Options.parse([f"--proj_dir={project}", *world.flags, *QUICK, *flags]))


def start(world, project, *flags, **how):
    command = [sys.executable, str(ROOT / "train.py"), f"--proj_dir={project}", *world.flags, *QUICK, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **how)


def rows(project, column):
    """Step -> value in metrics.csv."""
    with (project / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


def mission(project, name):
    return torch.load(project / f"rwkv-adapter-{name}.pth", weights_only=True)


def info(project, name):
    return json.loads((project / f"rwkv-adapter-{name}.json").read_text())


def steps_of(project):
    return sorted(int(path.stem.split("-")[2]) for path in project.glob("rwkv-adapter-*.pth"))


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(world, tmp_path_factory):
    """24 steps of 4 utterances by one process, with the learning rates of the published recipe."""
    project = tmp_path_factory.mktemp("single")
    assert train(world, project, "--epoch_count=4", "--lr_init=1e-4", "--lr_final=1e-4") == 0
    return project


def test_two_processes_under_zero_1_have_the_loss_curve_of_one(world, single, tmp_path):
    """DeepSpeed on two CPU processes over gloo; the other strategies are in tests/slow/test_strategies.py."""
    flags = ["--epoch_count=4", "--lr_init=1e-4", "--lr_final=1e-4", "--micro_bsz=2", "--devices=2"]
    process = start(world, tmp_path, *flags, "--strategy=deepspeed_stage_1", "--save_steps=20")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    one, two = rows(single, "loss"), rows(tmp_path, "loss")
    assert sorted(two) == list(range(1, 25))
    assert max(abs(one[step] - two[step]) for step in one) < 1e-5
    assert one[1] - one[24] > 0.1, "the case is void: nothing was learned"
    for name, x in mission(single, 24).items():
        torch.testing.assert_close(mission(tmp_path, 24)[name], x, atol=1e-5, rtol=0)
    (saved,) = tmp_path.glob("checkpoints/run-1/*.ckpt")
    trained = sum(x.numel() for x in mission(single, 24).values())
    files = [torch.load(path, weights_only=False) for path in sorted(saved.glob("checkpoint/*.pt"))]
    (model,) = [file["module"] for file in files if "module" in file]
    assert sum(x.numel() for x in model.values()) == trained, "frozen weights were saved"
    moments = [file["optimizer_state_dict"]["base_optimizer_state"] for file in files if "module" not in file]
    assert len(moments) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        pytest.param(["--strategy=deepspeed_stage_4"], [*STAGES, "ddp", "auto"], id="unknown-strategy"),
        pytest.param(["--early_stop=2"], ["--valid_split"], id="early-stop-without-validation"),
    ],
)
def test_a_mistake_is_one_line(world, tmp_path, flags, said):
    with pytest.raises(UserError) as error:
        train(world, tmp_path, *flags)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in said)


def test_fp16_on_several_gpus_is_not_given_to_deepspeed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    machine = fit_to_machine(MachineOptions())
    assert (machine.strategy, machine.devices, machine.precision) == ("deepspeed_stage_1", 4, "bf16")
    assert fit_to_machine(MachineOptions(precision="fp16")).strategy == "ddp"
    assert fit_to_machine(MachineOptions(devices=1)).strategy == "auto"


# --- ends of other kinds ---------------------------------------------------------------------------------------------


@pytest.fixture
def in_foreground():
    """Ctrl-C reaches this process: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(signal.SIGUSR1, 143, id="SIGUSR1"),
        pytest.param(signal.SIGINT, 130, id="SIGINT"),
    ],
)
def test_a_notice_saves_and_stops_and_the_same_command_goes_on(
    world, single, tmp_path, monkeypatch, caplog, in_foreground, number, status
):
    caplog.set_level("INFO", "rwkv_speech")
    plain = TrainingModule.training_step

    def step(self, batch, index):
        if self.trainer.global_step == 8:
            os.kill(os.getpid(), number)
        return plain(self, batch, index)

    flags = ["--epoch_count=4", "--lr_init=1e-4", "--lr_final=1e-4"]
    monkeypatch.setattr(TrainingModule, "training_step", step)
    before = signal.getsignal(number)
    assert train(world, tmp_path, *flags) == status
    assert signal.getsignal(number) == before
    assert "stopped at step 9" in caplog.text
    assert [path.name for path in tmp_path.glob("checkpoints/run-1/*.ckpt")] == ["step=9.ckpt"]
    monkeypatch.undo()
    assert train(world, tmp_path, *flags) == 0
    for name, x in mission(single, 24).items():
        assert torch.equal(mission(tmp_path, 24)[name], x)
    assert rows(tmp_path, "loss") == rows(single, "loss")


def interruptible():
    """Of a process that is started: Ctrl-C reaches it, also where whatever runs this test ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_reaches_all_processes_and_they_save_together(world, tmp_path):
    """As a terminal sends it: to two processes and the loaders' workers of each."""
    flags = ["--epoch_count=40", "--micro_bsz=2", "--devices=2", "--strategy=ddp", "--num_workers=1"]
    process = start(world, tmp_path, *flags, "--save_steps=0", start_new_session=True, preexec_fn=interruptible)
    while not ((tmp_path / "metrics.csv").exists() and len(rows(tmp_path, "loss")) > 2):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-2000:]
    (line,) = [line for line in err.splitlines() if "stopped at step" in line]
    assert "the same command goes on from there" in line
    assert "Traceback" not in err
    (point,) = tmp_path.glob("checkpoints/run-1/*.ckpt")
    assert point.name in {f"step={step}.ckpt" for step in range(3, 240)}
    assert not list(tmp_path.glob(".*.lock"))


def test_ctrl_c_before_training_or_twice_is_one_line(world, tmp_path, monkeypatch, capsys, in_foreground):
    plain, steps = TrainingModule.training_step, []

    def step(self, batch, index):
        steps.append(index)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, batch, index)

    def setup(self, *_, **__):
        raise KeyboardInterrupt

    flags = [*world.flags, *QUICK, "--epoch_count=1", f"--proj_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(MissionFiles, "setup", setup)
        assert entry.main() == 130
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from the first one on
    monkeypatch.setattr(TrainingModule, "training_step", step)
    assert entry.main() == 130
    signal.signal(signal.SIGINT, before)
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if line.startswith("train.py")] == 2 * [
        "train.py: interrupted; files that are complete stay"
    ]
    assert "Traceback" not in err


# --- one at a time ---------------------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from pathlib import Path
from rwkv_speech.engine.lock import project_lock
with project_lock(Path(sys.argv[1]), sys.argv[2]):
    worker = os.fork()  # as a loader's, that outlives its parent for a while
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("op", "operation"), [("train", "training"), ("eval", "evaluation")])
def test_a_second_one_in_a_folder_is_told_who_is_there(world, tmp_path, op, operation):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, operation], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    began = datetime.now().astimezone()
    flags = [f"--op={op}", f"--proj_dir={tmp_path}", *world.flags, *QUICK, "--epoch_count=1", "--epoch_steps=2"]
    try:
        with pytest.raises(UserError) as refused:
            OPS[op](Options.parse(flags))
    finally:
        holder.kill()
        holder.wait()
    said = re.fullmatch(
        rf"{tmp_path} is in use: (\w+) by process (\d+) on (\S+), since (\S+ \S+); .*", str(refused.value)
    )
    assert said.group(1, 2, 3) == (operation, str(holder.pid), socket.gethostname())
    assert abs((datetime.fromisoformat(said[4]) - began).total_seconds()) < 10
    os.kill(worker, 0)  # is still there
    if op == "train":
        assert OPS[op](Options.parse(flags)) == 0
    else:
        with pytest.raises(UserError, match="holds no mission file"):
            OPS[op](Options.parse(flags))
    os.kill(worker, signal.SIGKILL)
    assert not list(tmp_path.glob(".*.lock"))


def test_a_lock_is_one_process_at_a_time_and_leaves_nothing(tmp_path):
    """Six processes take it a hundred times each, and it is removed and made anew all the while."""
    code = """
import os, sys
from pathlib import Path
from rwkv_speech.engine import lock
from rwkv_speech.errors import UserError
lock._holder = lambda *_: ""
project, taken = Path(sys.argv[1]) / "a" / "b", 0
while taken < 100:
    try:
        with lock.project_lock(project, "training"):
            os.close(os.open(sys.argv[1] + "/alone", os.O_CREAT | os.O_EXCL))
            os.unlink(sys.argv[1] + "/alone")
            taken += 1
    except UserError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path]) for _ in range(6)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 6
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_other_processes_of_a_run_take_no_lock(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with project_lock(tmp_path / "out", "training"):
                assert not (tmp_path / "out").exists()
            patch.setenv(name, "0")
            with project_lock(tmp_path / "out", "training"):
                assert (tmp_path / "out" / ".training.lock").exists()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with project_lock(tmp_path, "training"):
        assert "No locks available" in caplog.text


def test_a_full_disk_is_one_line_and_leaves_the_last_files_whole(world, tmp_path):
    """The limit of a file's size stands for the disk: mission files fit, resume points don't."""
    flags = ["--epoch_count=1", "--save_steps=2"]
    assert train(world, tmp_path / "free", *flags) == 0
    before = mission(tmp_path / "free", 6)
    size = (tmp_path / "free/rwkv-adapter-6.pth").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(1.5 * size), resource.RLIM_INFINITY))

    process = start(world, tmp_path / "full", *flags, preexec_fn=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert "cannot write" in line
    assert "step=2.ckpt" in line
    assert "Traceback" not in err
    assert mission(tmp_path / "full", 2).keys() == before.keys()
    assert not list((tmp_path / "full").rglob("*.part"))
    assert train(world, tmp_path / "full", *flags) == 0  # with room again
    for name, x in before.items():
        assert torch.equal(mission(tmp_path / "full", 6)[name], x)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def poisoned(monkeypatch):
    """The logits of the third step's batch are NaN; gives its ids."""
    plain, logits, ids = TrainingModule.training_step, RWKV6.logits, []

    def training_step(self, batch, index):
        if self.trainer.global_step != 2:
            return plain(self, batch, index)
        ids[:] = batch.names
        with monkeypatch.context() as patch:
            patch.setattr(RWKV6, "logits", lambda *args: logits(*args) * math.nan)
            return plain(self, batch, index)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    return ids


def test_a_loss_that_is_none_stops_the_run(world, tmp_path, poisoned):
    with pytest.raises(UserError, match=r"step 3 is not finite.*--on_nonfinite skip"):
        train(world, tmp_path, "--epoch_count=1", "--save_steps=2")
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "ids": poisoned}]
    assert len(poisoned) == 4
    assert train(world, tmp_path, "--epoch_count=1", "--save_steps=2", "--on_nonfinite=skip") == 0
    assert len(list(tmp_path.glob("checkpoints/run-*"))) == 1, "skipping is how the same run goes on"


def test_a_loss_that_is_none_is_skipped(world, tmp_path, poisoned, caplog):
    assert train(world, tmp_path, "--epoch_count=1", "--on_nonfinite=skip", "--grad_clip=0") == 0
    losses = rows(tmp_path, "loss")
    assert sorted(losses) == [1, 2, 4, 5, 6], "a step without targets has no loss"
    assert all(math.isfinite(x) and x > 1 for x in losses.values())
    assert all(x.isfinite().all() for x in mission(tmp_path, 6).values())
    assert "1 of 6 steps were skipped, their losses not finite" in caplog.text


def test_a_run_of_skipped_steps_alone_has_not_succeeded(world, tmp_path, monkeypatch):
    plain = SpeechRWKV.loss_sum
    monkeypatch.setattr(SpeechRWKV, "loss_sum", lambda self, *batch, **more: plain(self, *batch, **more) * math.nan)
    with pytest.raises(UserError, match=r"6 of 6 steps were skipped.*: nothing was learnt"):
        train(world, tmp_path, "--epoch_count=1", "--on_nonfinite=skip")


def test_a_spoilt_language_model_is_named(world, tmp_path):
    content = torch.load(world.model, weights_only=True)
    content["blocks.1.ffn.key.weight"][3, 4] = math.nan
    torch.save(content, tmp_path / "spoilt.pth")
    for policy in ("stop", "skip"):
        with pytest.raises(UserError, match=r"spoilt\.pth: blocks\.1\.ffn\.key\.weight holds NaN or infinite numbers"):
            train(world, tmp_path, f"--load_model={tmp_path / 'spoilt.pth'}", f"--on_nonfinite={policy}")
    write_mission_file(
        tmp_path / "m.pth", (model := world.speech_rwkv(adapter_hidden=32)).trainable_state_dict(), model.describe()
    )
    flags = [*world.flags, f"--load_model={tmp_path / 'spoilt.pth'}", f"--adapter={tmp_path / 'm.pth'}"]
    with pytest.raises(UserError, match=r"spoilt\.pth: blocks\.1\.ffn\.key\.weight holds NaN or infinite numbers"):
        OPS["predict"](Options.parse([*flags, "--op=predict", "--file_path", str(world.utterances[0][0])]))


def test_spoilt_weights_cannot_be_skipped(tmp_path):
    spoilt = torch.nn.Parameter(torch.tensor([1.0, math.inf]))
    frozen = SimpleNamespace(check_weights=lambda: None)
    model = SimpleNamespace(
        language_model=frozen, trained_tensors=lambda: {"x": TrainedTensor(spoilt, "state", decay=False)}
    )
    with pytest.raises(UserError, match="weights are spoilt"):
        NonFiniteLosses("skip", tmp_path / "nonfinite.jsonl", model)(7, [])
    assert not (tmp_path / "nonfinite.jsonl").exists(), "this process's batch was good"


@pytest.fixture
def spoilt(monkeypatch):
    """The gradients of the third step are NaN; a function put into the list is called in it."""
    plain, then = TrainingModule.training_step, []

    def training_step(self, batch, index):
        if self.trainer.global_step == 2:
            for call in then:
                call()
        output = plain(self, batch, index)
        if self.trainer.global_step == 2:
            output["loss"].register_hook(lambda gradient: gradient * math.nan)
        return output

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    return then


def test_spoilt_weights_are_not_saved_for_a_stop_signal(world, tmp_path, spoilt):
    spoilt.append(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(UserError, match=r"weights after step 3 are not finite.*--adapter"):
        train(world, tmp_path, "--epoch_count=1", "--save_steps=0")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_weights_spoilt_under_a_finite_loss_are_not_saved(world, tmp_path, spoilt):
    with pytest.raises(UserError, match=r"weights after step 3 are not finite.*--adapter"):
        train(world, tmp_path, "--epoch_count=1", "--save_steps=1")
    assert [path.name for path in tmp_path.glob("*.pth")] == ["rwkv-adapter-2.pth"]
    assert all(x.isfinite().all() for x in mission(tmp_path, 2).values())
    points = [torch.load(path, weights_only=False) for path in tmp_path.rglob("*.ckpt")]
    assert points
    assert all(x.isfinite().all() for point in points for x in point["state_dict"].values())


# --- validation ------------------------------------------------------------------------------------------------------

VALIDATE = ["--valid_steps=3", "--max_new_tokens=6", "--save_steps=0"]


@pytest.fixture(scope="module")
def validated(world, tmp_path_factory):
    """Validated at steps 3, 6, 9, 12 and, as the last, 14; mission files of these steps."""
    project = tmp_path_factory.mktemp("validated")
    flags = ["--epoch_count=2", "--epoch_steps=7", "--micro_bsz=3", "--lr_init=1e-2", "--lr_final=1e-2"]
    valid = world.folder / "valid.jsonl"
    valid.write_text("".join((world.folder / "train.jsonl").read_text().splitlines(keepends=True)[:10]))
    assert train(world, project, *flags, *VALIDATE, f"--valid_split={valid}", "--average=3", "--beam=3") == 0
    return project


def test_validation_measures_loss_and_wer(world, validated):
    assert sorted(rows(validated, "valid_wer")) == sorted(rows(validated, "valid_loss")) == [3, 6, 9, 12, 14]
    model = world.speech_rwkv(adapter=validated / "rwkv-adapter-14.pth")
    audio, texts = zip(*[(str(path), text) for path, text in world.utterances[:10]], strict=True)
    hypotheses = model.transcribe(audio, batch_size=1, max_new_tokens=6, beam=3)
    assert hypotheses != model.transcribe(audio, max_new_tokens=6), "the case is void: a greedy search finds the same"
    wer = jiwer.wer(list(texts), [" ".join(h.lower().split()) for h in hypotheses])
    assert rows(validated, "valid_wer")[14] == pytest.approx(wer)
    assert info(validated, 14)["wer"] == pytest.approx(wer, abs=1e-6)
    from rwkv_speech.speech.audio import load_audio

    losses = [model.loss([load_audio(path)], [text]).item() for path, text in zip(audio, texts, strict=True)]
    loss = np.average(losses, weights=[len(text) + 1 for text in texts])
    assert rows(validated, "valid_loss")[14] == pytest.approx(loss, rel=1e-5)


def test_the_best_by_wer_and_the_latest_are_kept(validated):
    scores = rows(validated, "valid_wer")
    best = min(scores, key=lambda step: (scores[step], step))
    kept = {int(path.stem.split("-")[2]) for path in validated.glob("*.pth") if "avg" not in path.name}
    assert kept == {best, 9, 12, 14}


def test_the_mean_of_the_latest(validated):
    mean, latest = mission(validated, "14-avg3"), [mission(validated, step) for step in (9, 12, 14)]
    for name, x in mean.items():
        expected = np.mean([m[name].numpy().astype(np.float64) for m in latest], axis=0)
        np.testing.assert_allclose(x.numpy(), expected, rtol=1e-6, atol=1e-8)
    assert info(validated, "14-avg3")["mean_of"] == [f"rwkv-adapter-{step}.pth" for step in (9, 12, 14)]


def test_training_ends_after_validations_without_improvement(world, tmp_path, monkeypatch):
    rates = iter([0.9, 0.5, 0.7, 0.5, 0.1])
    from rwkv_speech.engine.validation import Validation

    def share(self, module):
        errors = round(10 * next(rates))
        words = " ".join(["x"] * errors + ["y"] * (10 - errors))
        return (
            1.0,
            1,
            [EvalRecord(id="u", reference=" ".join("y" * 10), hypothesis=words, seconds=1.0, mission="transcribe")],
        )

    monkeypatch.setattr(Validation, "_share", share)
    flags = ["--epoch_count=5", "--early_stop=2", "--valid_steps=2", f"--valid_split={world.folder / 'train.jsonl'}"]
    assert train(world, tmp_path, *flags) == 0
    assert rows(tmp_path, "valid_wer") == {2: 0.9, 4: 0.5, 6: 0.7, 8: 0.5}
    assert steps_of(tmp_path) == [4, 8]
    assert json.loads((tmp_path / "checkpoints/run-1/run.json").read_text())["finished"]


def test_characters_decide_where_words_are_not_spaced(world, tmp_path, monkeypatch, caplog):
    """Of 今天天气好, errors are 3, 1, 2 and 5 of 5 characters, spaces aside; of its one word 1, 2, 1 and 1."""
    caplog.set_level("INFO", "rwkv_speech")
    said = iter(["今明明明好", "今天天气 坏", "今天明明好", "一二三四五"])
    from rwkv_speech.engine.validation import Validation

    def share(self, module):
        return (
            1.0,
            1,
            [EvalRecord(id="u", reference="今天天气好", hypothesis=next(said), seconds=1.0, mission="transcribe")],
        )

    monkeypatch.setattr(Validation, "_share", share)
    valid = tmp_path / "valid.jsonl"
    valid.write_text(json.dumps({"audio": str(world.utterances[0][0]), "text": "今天天气好"}) + "\n")
    flags = ["--epoch_count=5", "--early_stop=2", "--valid_steps=2", f"--valid_split={valid}"]
    assert train(world, tmp_path, *flags) == 0
    assert rows(tmp_path, "valid_cer") == {2: 0.6, 4: 0.2, 6: 0.4, 8: 1.0}
    assert steps_of(tmp_path) == [4, 8]
    caplog.clear()
    flags = ["--op=eval", f"--proj_dir={tmp_path}", *world.flags, f"--data={valid}", "--max_new_tokens=2"]
    assert OPS["eval"](Options.parse([*flags, "--num_workers=0"])) == 0
    best = tmp_path / "rwkv-adapter-4.pth"
    assert json.loads((tmp_path / "eval/summary.json").read_text())["adapter"] == str(best)
    (line,) = [message for message in caplog.messages if message.startswith(f"evaluating {best}, ")]
    assert "best of its run by validation (cer 0.2); the newest is rwkv-adapter-8.pth" in line


def test_a_validation_without_usable_samples_is_an_error(world, tmp_path):
    valid = tmp_path / "valid.jsonl"
    valid.write_text('{"audio": "missing.wav", "text": "a"}\n')
    with pytest.raises(UserError, match="--valid_split: none of its 1 utterances can be used"):
        train(world, tmp_path, "--epoch_count=1", f"--valid_split={valid}", "--on_bad_audio=skip")


# --- what a run looks like -------------------------------------------------------------------------------------------


def test_a_run_shows_a_table_metrics_and_a_picture(world, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "rwkv_speech")
    assert train(world, tmp_path, "--epoch_count=5", "--log_every=1000") == 0
    shown = "".join(capsys.readouterr())
    model = world.speech_rwkv(adapter_hidden=32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    for part in ("RWKV-6 2 x 64", f"{trained:,} parameters", f"{frozen:,} parameters", "24 utterances", "GiB"):
        assert part in shown
    assert "30, 6 to an epoch; warm-up 4, learning rate up to 0.001" in shown
    first, last = [message for message in caplog.messages if message.startswith("step ")]
    number = r"\d[\d.e+-]*"
    measured = ", ".join(f"{name} {number}" for name in ("loss", "lr", "state_lr", "audio_s_per_s", "utt_per_s"))
    assert re.fullmatch(rf"step 1 of 30: {measured}, left \d+:\d\d:\d\d", first)
    assert re.fullmatch(rf"step 30 of 30: {measured}, left 0:00:00", last)
    assert not re.search(r"\r|Epoch|left=", shown), "no bar in a log"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(rows(tmp_path, "loss")) == list(range(1, 31))
    rates = rows(tmp_path, "lr")
    assert [rates[step] for step in (1, 3, 5, 30)] == pytest.approx([2e-4, 6e-4, 1e-3, 1e-3])
    assert all(rate > 0 for rate in rows(tmp_path, "audio_s_per_s").values())
    assert imread(tmp_path / "training.png").shape == (700, 1100, 4)


def test_a_terminal_has_a_bar(world, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", "rwkv_speech")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert train(world, tmp_path, "--epoch_count=1") == 0
    shown = "".join(capsys.readouterr())
    assert "Epoch 0:" in shown
    assert "left=0:00:" in shown
    assert "step 1 of" not in caplog.text


def test_a_run_that_cannot_learn_says_so_before_and_after(world, tmp_path, caplog):
    assert train(world, tmp_path, "--epoch_count=1", "--epoch_steps=1000", "--warmup_steps=100") == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    epochs, before, after = warnings
    assert "--epoch_steps 1000, but an epoch ends with its pass over the data, after 6: the run has 6 steps" in epochs
    assert "for 1000 set --epoch_count 167" in epochs
    reached = max(rows(tmp_path, "lr").values())
    assert reached == pytest.approx(1e-3 * (0.2 + 0.8 * 5 / 100))
    assert before == after
    assert before.startswith(f"6 steps lie within the warm-up of 100: the learning rate gets to {reached:.3g}, ")
    assert "--lr_init is 0.001" in before


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, caplog, capsys):
    """10 of 100 at each time; 40 were done before. At 30 s 30 more took 30 s, and 30 are left; then 50 took 61 s."""
    caplog.set_level("INFO", "rwkv_speech")
    times = iter([0.0, 10.0, 29.0, 30.0, 45.0, 61.0])
    monkeypatch.setattr("rwkv_speech.progress.time", SimpleNamespace(monotonic=lambda: next(times)))
    asked = []
    with Progress("all", 100, done=40, log_every=30.0) as progress:
        for _ in range(5):
            progress.advance(10, lambda: asked.append(1) or "WER 5 %")
    assert caplog.messages == [
        "all: 70 of 100 utterances, 1 a second, 0:00:30 left, WER 5 %",
        "all: 90 of 100 utterances, 0.82 a second, 0:00:12 left, WER 5 %",
    ]
    assert len(asked) == 2
    assert not "".join(capsys.readouterr())


def test_progress_in_a_terminal_is_a_bar(monkeypatch, caplog, capsys):
    caplog.set_level("INFO", "rwkv_speech")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as rich has it
    with Progress("all", 100, log_every=1e-9) as progress:
        progress.advance(50, lambda: "WER 5 %")
        print("a transcript")
    shown = capsys.readouterr()
    assert shown.out == "a transcript\n"
    assert "50/100" in shown.err
    assert "WER 5 %" in shown.err
    assert not caplog.messages


def test_everything_that_takes_long_shows_its_progress(world, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "rwkv_speech")
    soon = "--log_every=1e-9"
    flags = [f"--valid_split={world.folder / 'train.jsonl'}", f"--cache_features={tmp_path / 'frames'}"]
    assert train(world, tmp_path, "--epoch_count=1", "--max_new_tokens=2", *flags, soon) == 0
    steps = [message.split(":")[0] for message in caplog.messages if message.startswith("step ")]
    assert steps == [*(f"step {i} of 6" for i in range(1, 7)), "step 6"], "and the validation's line"
    speed = r"\d[\d.e+]* a second, \d+:\d\d:\d\d left"
    flags = [f"--proj_dir={tmp_path}", *world.flags, "--num_workers=0", "--max_new_tokens=2", soon]
    assert OPS["eval"](Options.parse(["--op=eval", *flags])) == 0
    paths = [str(path) for path, _ in world.utterances[:2]]
    assert OPS["predict"](Options.parse(["--op=predict", *flags, "--file_path", *paths])) == 0
    for line in (
        rf"lengths of recordings: 24 of 24 recordings, {speed}",
        rf"caching frames: 24 of 24 utterances, {speed}, \d[\d.e+]* x real time",
        rf"validation: 8 of 24 utterances, {speed}",
        rf"all: 16 of 24 utterances, {speed}, WER \d+\.\d %",
        rf"prediction: 1 of 2 files, {speed}",
    ):
        assert [message for message in caplog.messages if re.fullmatch(line, message)], line
    assert "\r" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("generation", "model"), [(6, RWKV6), (7, RWKV7)], ids=["rwkv6", "rwkv7"])
def test_a_block_keeps_what_the_estimate_of_memory_says(generation, model, dtype):
    """On the CPU; on a GPU the operator saves more states."""
    sizes = official_sizes(generation=generation, n_layer=3, n_embd=512, vocab_size=257)
    tensors = random_weights(sizes, seed=0, time_state=True)
    model = model.from_tensors(sizes, tensors, device="cpu", dtype=dtype)
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
    for state in model.time_states:
        state.requires_grad_()

    def held(positions: int) -> int:
        kept = {}

        def pack(x):
            kept.setdefault(x.untyped_storage().data_ptr(), x)  # held, so that no address comes twice
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.randn(2, positions, sizes.n_embd, dtype=dtype, requires_grad=True))
        return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights)

    each = (held(4 * POSITIONS) - held(POSITIONS)) / (2 * 3 * POSITIONS * sizes.n_embd * sizes.n_layer)
    assert each == pytest.approx(block_bytes(sizes, dtype.itemsize, "cpu"), rel=0.03)


@pytest.mark.parametrize(("generation", "gigabytes"), [(6, 3.53), (7, 4.10)])
def test_memory_without_checkpointing_is_what_an_h200_took_more(generation, gigabytes):
    """3B, four samples of 15 s, bf16: the difference that `grad_cp=1` makes, by bench/gpu.sh."""
    sizes = official_sizes(generation=generation, n_layer=32, n_embd=2560)
    all_but_one = 31 * block_bytes(sizes, 2, "cuda") - 32 * 2  # of all others, checkpointing keeps their inputs
    assert 4 * POSITIONS * sizes.n_embd * all_but_one / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_there_are_logits_at_transcript_positions_only(world):
    model, rows = world.speech_rwkv(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.dim() > 1]
            rows.extend(x.numel() // 257 for x in given if x.shape[-1] == 257)
            return result

    waveforms = [torch.randn(320 * count + 80) for count in (500, 300)]
    with Watch():
        model.loss(waveforms, ["abc", "de"]).backward()
    targets = 4 + 3  # letters and ends of text
    # The other tensor with a side of the vocabulary is the transposed matrix of the head, 64 rows.
    assert set(rows) == {targets, 64}, "of 100 + 4 positions of each sample"


def test_the_table_of_metrics_goes_on_where_the_run_does(tmp_path):
    path = tmp_path / "metrics.csv"
    for run, steps in (("a", (1, 2)), ("b", (1, 2, 3))):
        file = MetricsFile(path, run, COLUMNS)
        file.begin(0)
        for step in steps:
            file.add({"step": step, "epoch": 0, "loss": 10.0 + step})
    with path.open("a") as torn:
        torn.write("b,4,0")
    file = MetricsFile(path, "b", [*COLUMNS, "valid_f1"])
    file.begin(2)
    file.add({"step": 3, "epoch": 0, "loss": 7.0})
    lines = [line.split(",")[:4] for line in path.read_text().splitlines()[1:]]
    assert lines == [["a", "1", "0", "11.0"], ["a", "2", "0", "12.0"], ["b", "1", "0", "11.0"],
                     ["b", "2", "0", "12.0"], ["b", "3", "0", "7.0"]]  # fmt: skip
    assert [row["loss"] for row in file.rows] == [11.0, 12.0, 7.0]


def test_the_picture_shows_what_was_measured(tmp_path):
    measured = [{"step": s, "loss": 5 / s, "lr": 1e-4, "state_lr": 1e-3, "audio_s_per_s": 9.0} for s in range(1, 9)]
    (tmp_path / "without.png").write_bytes(draw(measured, {"": WER}))
    (tmp_path / "with.png").write_bytes(draw([*measured, {"step": 8, "valid_wer": 0.2, "valid_loss": 1.0}], {"": WER}))
    without, scored = (imread(tmp_path / f"{name}.png") for name in ("without", "with"))
    different = (without != scored).any(axis=-1)
    assert different[350:, :550].any(), "the panel of the word error rate"
    assert different[:350, :550].any(), "the validation's loss beside that of training"


def test_the_picture_is_drawn_after_the_last_validation(world, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("rwkv_speech.engine.metrics.draw", lambda rows, leading: drawn.append(list(rows)) or b"")
    train(
        world,
        tmp_path,
        "--epoch_count=1",
        *VALIDATE,
        "--valid_steps=4",
        f"--valid_split={world.folder / 'train.jsonl'}",
    )
    assert [row["step"] for row in drawn[-1] if "valid_wer" in row] == [4, 6]


def test_hours():
    assert [hours(s) for s in (0, 59.6, 3599, 360_000)] == ["0:00:00", "0:01:00", "0:59:59", "100:00:00"]


def test_starting_is_not_slowed_down_by_deepspeed():
    """Its import takes seconds; only its users wait for it."""
    code = "import sys, rwkv_speech.ops; sys.exit('deepspeed' in sys.modules)"
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0, time.monotonic() - began
