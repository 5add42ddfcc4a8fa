"""Training, evaluation and prediction from the flags on: what is written, resumed, kept and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from rwkv_speech.data.sources import load_split
from rwkv_speech.engine.mission_files import MissionFiles
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.engine.runs import Run, find_run
from rwkv_speech.engine.validation import Validation
from rwkv_speech.errors import UserError
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops.train_data import longest_of
from rwkv_speech.options import Options, TrainingOptions
from rwkv_speech.scoring import EvalRecord
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.audio import load_audio
from rwkv_speech.speech.frame_cache import AbsentEncoder
from rwkv_speech.speech.recording import Recording
from rwkv_speech.terminal import printable
from tests.tiny import NO_FILES, QUICK, at_door, do, last, losses, missions, no_file

pytestmark = pytest.mark.usefixtures("voiced")

ROOT = Path(__file__).parents[1]


def contents(folder):
    """Every file below that belongs to one run, with its time and content."""
    shared = ("metrics.csv", "training.png", "durations.json")
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name not in shared]
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(x, others[name]) for name, x in some.items())


class PowerCutError(Exception):
    pass


@pytest.fixture
def cut_power(monkeypatch):
    """cut_power(n): the n-th training step from then on fails, before anything of it is saved."""
    plain = TrainingModule.training_step

    def cut(number):
        steps = []

        def training_step(self, batch, index):
            steps.append(index)
            if len(steps) == number:
                raise PowerCutError
            return plain(self, batch, index)

        monkeypatch.setattr(TrainingModule, "training_step", training_step)

    return cut


# --- train, eval, predict --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world, librispeech, tmp_path_factory):
    """A project that was trained for 60 steps of 4 on train-clean-100 (4 steps to an epoch)."""
    project = tmp_path_factory.mktemp("trained") / "out put"
    flags = ["--data=librispeech", f"--data_dir={librispeech}", "--epoch_count=15", "--epoch_save=5"]
    assert do("train", world, project, *flags, "--lr_init=5e-3", "--state_lr_scale=20", "--epoch_steps=4") == 0
    return project


def test_training_lowers_the_loss_and_writes_a_mission_file(trained, world):
    files = missions(trained)
    _, info = files["rwkv-adapter-60.pth"]
    assert (info["step"], info["mission"], info["encoder"], info["n_layer"]) == (60, "transcribe", world.encoder, 2)
    curve = losses(trained)
    assert sorted(curve) == list(range(1, 61))
    epochs = np.array([curve[step] for step in sorted(curve)]).reshape(15, 4).mean(axis=1)
    assert epochs[0] > 5, "the first loss is about ln 257"
    assert epochs[-1] < epochs[0] - 0.7
    longest = max(soundfile.info(path).frames for path, _ in world.utterances[:16])
    assert info["trained_audio_s"] == longest / 16_000
    assert info["train_loss"] == pytest.approx(epochs[-5:].mean(), rel=0.02), "up to the weights of the steps"


def test_evaluation_reads_it_back_and_prints_two_rates(trained, world, librispeech, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", "rwkv_speech")
    flags = [*world.flags, *QUICK, "--data=librispeech", f"--data_dir={librispeech}", "--max_new_tokens=20"]
    flags = [flag for flag in flags if not flag.startswith("--encoder")]  # the mission file tells
    status, printed = at_door(monkeypatch, capsys, "--op=eval", f"--proj_dir={trained}", *flags)
    assert status == 0
    assert f"evaluating {trained / 'rwkv-adapter-60.pth'}, the newest" in caplog.text
    for split, count in (("test-clean", 5), ("test-other", 3)):
        records = [json.loads(line) for line in (trained / f"eval/{split}.jsonl").read_text().splitlines()]
        assert len(records) == count
        references = [record["reference"] for record in records]
        assert references == [text.lower() for text in references]
        # To jiwer words end at blanks only, and random bytes hold other white space.
        pairs = [(record["reference"], " ".join(record["hypothesis"].split())) for record in records]
        corpus = jiwer.wer([r for r, _ in pairs], [h for _, h in pairs])
        mean = np.mean([jiwer.wer(r, h) for r, h in pairs])
        (line,) = [line for line in printed.out.splitlines() if line.startswith(f"{split}: ")]
        found = [float(rate) / 100 for rate in re.findall(r"([\d.]+)%", line)]
        assert found == [pytest.approx(corpus, abs=1e-4), pytest.approx(mean, abs=1e-4)]
    summary = json.loads((trained / "eval/summary.json").read_text())
    assert summary["adapter"] == str(trained / "rwkv-adapter-60.pth")


def test_prediction_prints_a_line_for_each_file_and_nothing_else(trained, world, tmp_path, monkeypatch, capsys):
    paths = [path for path, _ in world.utterances[:3]]
    stereo = tmp_path / "a 'stereo' [file].wav"
    soundfile.write(stereo, np.random.default_rng(0).normal(0, 0.1, (44100, 2)), 44100)
    flags = ["--op=predict", f"--proj_dir={trained}", "--max_new_tokens=20"]
    flags += [f for f in world.flags if f.startswith(("--load_model", "--acc"))]
    expected = SpeechRWKV.from_pretrained(world.model, adapter=trained / "rwkv-adapter-60.pth").transcribe(
        [*paths, stereo], max_new_tokens=20
    )
    status, printed = at_door(monkeypatch, capsys, *flags, "--file_path", *paths, stereo)
    expected = [printable(" ".join(text.split())) for text in expected]  # of random letters some control a terminal
    assert (status, printed.out.split("\n")) == (0, [*expected, ""])
    assert len(set(expected)) > 1

    bad, missing = tmp_path / "bad.wav", tmp_path / "missing.flac"
    bad.write_bytes(b"")
    status, printed = at_door(monkeypatch, capsys, *flags, "--file_path", bad, paths[0], missing, paths[1])
    assert status == 1
    assert printed.out.splitlines() == expected[:2]


def test_a_folder_and_a_glob_stand_for_their_files(trained, world, tmp_path, monkeypatch, capsys):
    for name, (path, _) in zip(("b.wav", "a.WAV", "sub/c.wav", "._b.wav"), world.utterances, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no audio")
    (tmp_path / "sub" / "round").symlink_to(tmp_path)
    flags = ["--op=predict", f"--proj_dir={trained}", "--max_new_tokens=4", *world.flags[:1], "--accelerator=cpu"]
    for pattern, count in ((tmp_path, 3), (tmp_path / "*.wav", 1), (tmp_path / "s*", 3)):
        status, printed = at_door(monkeypatch, capsys, *flags, "--file_path", pattern)
        assert (status, len(printed.out.splitlines())) == (0, count)
    status, printed = at_door(monkeypatch, capsys, *flags, "--file_path", tmp_path / "*.flac")
    assert (status, printed.out) == (2, "")


def test_training_starts_from_the_weights_of_adapter(trained, world, tmp_path):
    flags = ["--epoch_count=1", "--epoch_steps=1", "--lr_init=1e-9", "--lr_final=1e-9"]
    do("train", world, tmp_path, *flags, f"--adapter={trained / 'rwkv-adapter-60.pth'}")
    before, after = last(trained), last(tmp_path)
    for name, x in before.items():
        torch.testing.assert_close(after[name], x, atol=1e-7, rtol=0)


# --- one step, however it is cut -------------------------------------------------------------------------------------

# With a large epsilon Adam's steps follow the size of the gradients, which it hides otherwise, as clipping does.
STEADY = ["--adam_eps=1", "--grad_clip=0", "--save_steps=0", "--lr_init=1e-2", "--lr_final=1e-2"]


@pytest.fixture(scope="module")
def uneven(world, tmp_path_factory):
    """A manifest of 22 utterances: with 4 to a step the last step of an epoch has 2."""
    path = world.folder / "uneven.jsonl"
    path.write_text("".join((world.folder / "train.jsonl").read_text().splitlines(keepends=True)[:22]))
    return f"--data={path}"


def test_accumulated_micro_batches_are_one_batch(world, tmp_path, uneven):
    flags = [*STEADY, uneven, "--epoch_count=1"]
    do("train", world, tmp_path / "whole", *flags, "--micro_bsz=4")
    do("train", world, tmp_path / "parts", *flags, "--micro_bsz=2", "--accumulate_grad_batches=2")
    do("train", world, tmp_path / "ones", *flags, "--micro_bsz=1", "--accumulate_grad_batches=4")
    whole = missions(tmp_path / "whole")["rwkv-adapter-6.pth"]
    for other in ("parts", "ones"):
        parts = missions(tmp_path / other)["rwkv-adapter-6.pth"]
        assert parts[1]["train_loss"] == pytest.approx(whole[1]["train_loss"], rel=1e-5)
        for name, x in whole[0].items():
            torch.testing.assert_close(parts[0][name], x, atol=5e-6, rtol=0)


def test_the_order_of_data_and_the_first_weights_follow_from_the_seed(world, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        do("train", world, tmp_path / name, "--epoch_count=1", "--epoch_steps=2", f"--random_seed={seed}")
    a, b, c = (last(tmp_path / name) for name in "abc")
    assert equal(a, b)
    assert not equal(a, c)


def test_epoch_steps_counts_optimiser_steps(world, tmp_path, capsys):
    flags = ["--epoch_count=2", "--epoch_steps=3", "--micro_bsz=2", "--accumulate_grad_batches=2"]
    do("train", world, tmp_path, *flags)
    assert capsys.readouterr().out == "", "a reader of standard output that goes away would end the training"
    assert last(tmp_path) is not None
    assert max(info["step"] for _, info in missions(tmp_path).values()) == 6


# --- resuming --------------------------------------------------------------------------------------------------------

RUN = ["--epoch_count=2", "--save_steps=4", "--lr_final=1e-4"]  # 6 steps of 4 to an epoch


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    project = tmp_path_factory.mktemp("uninterrupted")
    do("train", world, project, *RUN)
    return project


@pytest.mark.parametrize(
    ("steps", "resumed_at"),
    [
        pytest.param([6], [4], id="within-an-epoch"),
        pytest.param([8], [6], id="after-an-epoch"),
        pytest.param([11], [8], id="within-the-second"),
        pytest.param([6, 2, 4], [4, 4, 6], id="three-times"),
    ],
)
def test_an_interrupted_run_ends_as_if_it_were_not(
    world, tmp_path, uninterrupted, cut_power, monkeypatch, caplog, steps, resumed_at
):
    caplog.set_level("INFO", "rwkv_speech")
    for step in steps:
        cut_power(step)
        with pytest.raises(PowerCutError):
            do("train", world, tmp_path, *RUN)
        assert not json.loads((tmp_path / "checkpoints/run-1/run.json").read_text())["finished"]
    monkeypatch.undo()
    do("train", world, tmp_path, *RUN)
    assert [int(n) for n in re.findall(r"going on with the unfinished run 1 from \S*step=(\d+)", caplog.text)] == (
        resumed_at
    )
    assert equal(last(tmp_path), last(uninterrupted))
    assert missions(tmp_path).keys() == missions(uninterrupted).keys()
    for name, (_, info) in missions(uninterrupted).items():
        assert missions(tmp_path)[name][1]["train_loss"] == info["train_loss"]
    assert json.loads((tmp_path / "checkpoints/run-1/run.json").read_text())["finished"]


def test_a_run_cut_between_an_epochs_last_step_and_its_end_goes_on(world, tmp_path, uninterrupted, monkeypatch):
    """With a resume point of that very step: the epoch must neither be repeated nor lack a batch."""
    flags = [*RUN, "--save_steps=3", "--epoch_steps=6"]  # below 50, every step is logged
    do("train", world, tmp_path / "whole", *flags)

    def cut(*_):
        raise PowerCutError

    monkeypatch.setattr(MissionFiles, "on_train_epoch_end", cut)
    with pytest.raises(PowerCutError):
        do("train", world, tmp_path / "cut", *flags)
    monkeypatch.undo()
    do("train", world, tmp_path / "cut", *flags)
    assert equal(last(tmp_path / "cut"), last(tmp_path / "whole"))
    assert sorted(losses(tmp_path / "cut")) == list(range(1, 13))
    # Where resume points are written changes nothing in what is learned.
    assert equal(last(tmp_path / "cut"), last(uninterrupted))


def test_a_run_cut_in_the_middle_of_accumulating_goes_on(world, tmp_path, uneven, cut_power, monkeypatch):
    flags = [*RUN, uneven, "--micro_bsz=1", "--accumulate_grad_batches=4", "--save_steps=2"]
    do("train", world, tmp_path / "whole", *flags)
    for micro_batch in (11, 19):
        cut_power(micro_batch)
        with pytest.raises(PowerCutError):
            do("train", world, tmp_path / "cut", *flags)
    monkeypatch.undo()
    do("train", world, tmp_path / "cut", *flags)
    assert equal(last(tmp_path / "cut"), last(tmp_path / "whole"))


def test_a_run_cut_after_its_last_step_is_finished_by_the_same_command(world, tmp_path, monkeypatch):
    flags = ["--epoch_count=1"]

    def cut(*_):
        raise PowerCutError

    monkeypatch.setattr(MissionFiles, "on_train_end", cut)
    with pytest.raises(PowerCutError):
        do("train", world, tmp_path, *flags)
    monkeypatch.undo()
    before = last(tmp_path)
    do("train", world, tmp_path, *flags)
    assert json.loads((tmp_path / "checkpoints/run-1/run.json").read_text())["finished"]
    assert list(missions(tmp_path)) == ["rwkv-adapter-6.pth"]
    assert equal(last(tmp_path), before)


def test_a_killed_process_resumes_in_another(world, tmp_path, uninterrupted):
    """By the real signal, with workers, from a shell's point of view."""
    flags = [*world.flags, *QUICK, *RUN, "--num_workers=2"]
    # `train.py` itself kills the process after 5 steps: from outside, the moment could not be chosen.
    program = (
        "import os, signal, sys; import train; from rwkv_speech.engine.module import TrainingModule as S\n"
        "plain = S.training_step\n"
        "def step(self, batch, i):\n"
        "    if self.trainer.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(self, batch, i)\n"
        "S.training_step = step; sys.exit(train.main())"
    )
    arguments = [f"--proj_dir={tmp_path}", *flags]
    killed = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    do("train", world, tmp_path, *RUN)
    assert equal(last(tmp_path), last(uninterrupted))


@pytest.mark.parametrize("change", ["shortened", "other-texts", "another-recording"])
def test_a_run_whose_data_changed_says_so_and_starts_its_epoch_anew(world, tmp_path, monkeypatch, caplog, change):
    recordings = [shutil.copy(path, tmp_path / path.name) for path, _ in world.utterances]
    lines = [{"audio": str(x), "text": t, "id": x.stem} for x, (_, t) in zip(recordings, world.utterances, strict=True)]
    manifest = tmp_path / "data.jsonl"

    def write(lines):
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))

    plain, steps, cut = TrainingModule.training_step, [], 9  # of 6 to an epoch; the resume point is of step 8

    def training_step(self, batch, index):
        if len(steps) == cut:
            raise PowerCutError
        weights = {name: x.detach().clone() for name, x in self.model.trainable_state_dict().items()}
        moments = sum(len(state) for state in self.trainer.optimizers[0].state.values())
        steps.append(
            (self.trainer.global_step, self.trainer.current_epoch, batch.names, batch.references, weights, moments)
        )
        return plain(self, batch, index)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    flags = [f"--data={manifest}", "--epoch_count=2", "--save_steps=4", "--lr_final=1e-4"]
    write(lines)
    with pytest.raises(PowerCutError):
        do("train", world, tmp_path / "out", *flags)
    before = next(weights for step, *_, weights, _ in steps if step == 8)
    assert "changed since" not in caplog.text
    steps.clear()
    cut = None
    if change == "shortened":
        lines = lines[:7]
    elif change == "other-texts":
        lines[3]["text"] = "jjj"
    elif change == "another-recording":
        shutil.copy(world.utterances[5][0], recordings[3])
    write(lines)
    assert do("train", world, tmp_path / "out", *flags) == 0
    first, *_ = steps
    assert first[:2] == (8, 1)
    assert equal(first[4], before), "the weights go on"
    assert first[5] == 3 * len(before), "so do both moments of each, and the number of steps"
    texts = {line["id"]: line["text"] for line in lines}
    seen = [pair for _, _, names, said, *_ in steps for pair in zip(names, said, strict=True)]
    assert sorted(seen) == sorted(texts.items()), "each sample once, as it is now"
    (warning,) = [record.getMessage() for record in caplog.records if "changed since" in record.getMessage()]
    assert warning.startswith("the training data changed since ")
    assert "step=8.ckpt" in warning
    assert warning.endswith("weights and optimiser go on, epoch 1 starts anew")


def test_scores_on_other_samples_are_not_compared(world, tmp_path, cut_power, monkeypatch):
    """Validated on another split since it was interrupted, the best file is the best of that split."""
    manifests = []
    for name, part in (("easy", slice(3)), ("hard", slice(3, 6))):
        manifests.append(world.folder / f"{name}.jsonl")
        manifests[-1].write_text("".join((world.folder / "train.jsonl").read_text().splitlines(keepends=True)[part]))
    rates = {"easy": iter([0.1]), "hard": iter([0.9, 0.8, 0.7])}

    def share(self, module):
        errors = round(10 * next(rates["hard" if self.batches.dataset.rows[0].id == "u3" else "easy"]))
        words = " ".join(["x"] * errors + ["y"] * (10 - errors))
        return (
            1.0,
            1,
            [EvalRecord(id="u", reference=" ".join("y" * 10), hypothesis=words, seconds=1.0, mission="transcribe")],
        )

    monkeypatch.setattr(Validation, "_share", share)
    flags = ["--epoch_count=2", "--valid_steps=4", "--save_steps=5", "--early_stop=3"]
    cut_power(6)
    with pytest.raises(PowerCutError):
        do("train", world, tmp_path, *flags, f"--valid_split={manifests[0]}")
    cut_power(100)
    do("train", world, tmp_path, *flags, f"--valid_split={manifests[1]}")
    files = missions(tmp_path)
    assert files["rwkv-adapter-12.pth"][1]["wer"] == 0.8
    point = torch.load(*tmp_path.glob("checkpoints/run-1/*.ckpt"), weights_only=True)
    (state,) = [state for name, state in point["callbacks"].items() if name == "MissionFiles transcribe"]
    assert state["best"] == (0.9, "rwkv-adapter-8.pth")


@pytest.mark.parametrize("part", ["load_model", "encoder"])
def test_a_run_whose_frozen_parts_have_other_weights_is_another_run(world, tmp_path, cut_power, caplog, part):
    place = tmp_path / "part"
    if part == "load_model":
        content = torch.load(world.model, weights_only=True)
        torch.save(content, place)
    else:
        shutil.copytree(world.encoder, place)
    cut_power(2)
    with pytest.raises(PowerCutError):
        do("train", world, tmp_path / "out", f"--{part}={place}")
    if part == "load_model":
        torch.save(content | {"emb.weight": content["emb.weight"] * 1.5}, place)
    else:
        content = load_file(place / "model.safetensors")
        save_file(
            {name: x * 1.5 for name, x in content.items()}, place / "model.safetensors", metadata={"format": "pt"}
        )
    caplog.set_level("INFO", "rwkv_speech")
    cut_power(1)
    with pytest.raises(PowerCutError):
        do("train", world, tmp_path / "out", f"--{part}={place}")
    assert f"had other {part}_weights; this is run 2" in caplog.text


def test_a_damaged_resume_point_is_one_line_that_says_what_to_remove(
    world, tmp_path, uninterrupted, cut_power, monkeypatch, capsys
):
    cut_power(6)
    with pytest.raises(PowerCutError):
        do("train", world, tmp_path, *RUN)
    monkeypatch.undo()
    (point,) = tmp_path.glob("checkpoints/run-1/step=4.ckpt")
    whole = point.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]  # one bit, which torch.load takes
    for content in (b"", whole[:middle], b"no archive", flipped):
        point.write_bytes(content)
        status, printed = at_door(monkeypatch, capsys, *world.flags, *QUICK, *RUN, f"--proj_dir={tmp_path}")
        assert status == 2
        assert f"train.py: {point} is damaged: remove it, and the same command" in printed.err
        assert "Traceback" not in printed.err
    assert missions(tmp_path)
    point.unlink()
    monkeypatch.undo()
    do("train", world, tmp_path, *RUN)
    assert equal(last(tmp_path), last(uninterrupted))
    assert not list(tmp_path.glob("checkpoints/run-2"))
    for content in ("", "{", "[]", '{"finished": false}'):
        (tmp_path / "checkpoints/run-1/run.json").write_text(content)
        options = Options.parse([*world.flags, f"--proj_dir={tmp_path}"])
        assert find_run(options, {}).number == 2


def test_a_run_with_other_options_leaves_an_unfinished_one_alone(world, tmp_path, cut_power, monkeypatch, caplog):
    cut_power(6)
    with pytest.raises(PowerCutError):
        do("train", world, tmp_path, *RUN)
    monkeypatch.undo()
    before = contents(tmp_path)
    caplog.set_level("INFO", "rwkv_speech")
    do("train", world, tmp_path, *RUN, "--lr_init=2e-3")
    after = contents(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert "lr_init" in caplog.text
    new = {path.name for path in set(after) - set(before) if path.suffix == ".pth"}
    assert "rwkv-adapter-12.pth" in new
    assert len(new) <= 2
    assert json.loads((tmp_path / "checkpoints/run-2/run.json").read_text())["finished"]


def test_a_finished_run_is_not_continued_nor_overwritten(world, tmp_path):
    flags = ["--epoch_count=1", "--epoch_steps=2"]
    do("train", world, tmp_path, *flags)
    before = contents(tmp_path)
    do("train", world, tmp_path, *flags)
    assert sorted(missions(tmp_path)) == ["rwkv-adapter-2-run2.pth", "rwkv-adapter-2.pth"]
    # Whoever needs room deletes the checkpoints; numbers start again then, the files must not.
    for names in (3, 4):
        shutil.rmtree(tmp_path / "checkpoints")
        do("train", world, tmp_path, *flags)
        assert len(missions(tmp_path)) == names
    after = contents(tmp_path)
    for path, content in before.items():
        if path.parent == tmp_path:
            assert after[path] == content, path


def test_latest_and_best_are_kept_and_only_own_files_deleted(tmp_path):
    module = SimpleNamespace(
        model=SimpleNamespace(
            trainable_state_dict=lambda task, published: {"x": torch.zeros(1)},
            trained_tensors=dict,
            peft_weights=lambda: None,
        )
    )
    foreign = ["rwkv-adapter-2.pth", "rwkv-adapter-2.json", "rwkv-adapter-9.pth", "other.pth"]
    folders = ["rwkv-adapter-3", "rwkv-adapter-4"]
    foreign += [f"{folder}/adapter_config.json" for folder in folders]
    (tmp_path / folders[1]).mkdir()
    for name in foreign[:-2] + foreign[-1:]:
        (tmp_path / name).write_text("of another run")
    callback = MissionFiles(tmp_path, Run(5, tmp_path, {}, "f00"), "transcribe", {}, epoch_save=1, save_steps=1)
    kept = []
    for step, loss in enumerate([3.0, 2.0, 4.0, 2.5, 1.0, 1.5], start=1):
        outputs = {"stats": SimpleNamespace(loss_sum=loss * 10, tokens=10)}
        trainer = SimpleNamespace(global_step=step, current_epoch=0, is_global_zero=True, strategy=None)
        names, samples = ["transcribe", "transcribe", "label"], [8_000 * step, 40_000, 90_000]
        batch = SimpleNamespace(samples=samples, owners=[0, 1, 2], missions=names)
        callback.on_train_batch_end(trainer, module, outputs, batch, step)
        files = {path.name for path in tmp_path.iterdir()} - {*foreign, *folders}
        assert {name.replace(".json", ".pth") for name in files} == {name for name in files if "pth" in name}
        kept.append(sorted(name.removeprefix("rwkv-adapter-") for name in files if "pth" in name))
        if step == 3:  # beside a file of this run that has none
            (tmp_path / folders[0]).mkdir()
            (tmp_path / foreign[-2]).write_text("of another run")
        state = json.loads(json.dumps(callback.state_dict()))  # as after an interruption
        callback = MissionFiles(tmp_path, Run(5, tmp_path, {}, "f00"), "transcribe", {}, epoch_save=1, save_steps=1)
        callback.load_state_dict(state)
    best = "2-run5.pth"  # its name was taken
    assert kept == [["1.pth"], [best], [best, "3.pth"], [best, "4-run5.pth"], ["5.pth"], ["5.pth", "6.pth"]]
    assert all((tmp_path / name).read_text() == "of another run" for name in foreign)
    lengths = [json.loads((tmp_path / f"rwkv-adapter-{step}.json").read_text())["trained_audio_s"] for step in (5, 6)]
    assert lengths == [2.5, 3.0], "the longest so far, over the interruptions"


@pytest.mark.parametrize("cache", [False, True], ids=["", "frames-cached"])
def test_segments_of_one_file_are_learnt_and_evaluated_as_files_of_their_own(world, tmp_path, cache):
    lines = [json.loads(line) for line in (world.folder / "train.jsonl").read_text().splitlines()][:10]
    waveforms = [soundfile.read(world.folder / line["audio"], dtype="int16")[0] for line in lines]
    soundfile.write(tmp_path / "talk.flac", np.concatenate(waveforms), 16000)
    offsets = np.cumsum([0, *(len(x) / 16000 for x in waveforms)])
    cut = [line | {"audio": "talk.flac", "offset": offset} for line, offset in zip(lines, offsets, strict=False)]
    of_its_own = [line | {"audio": str(world.folder / line["audio"])} for line in lines]
    written = {}
    for name, entries in (("cut", cut), ("files", of_its_own)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        flags = [f"--data={tmp_path / name}.jsonl", "--epoch_count=1", "--max_new_tokens=5"]
        project = tmp_path / f"out {name}"
        assert do("train", world, project, *flags, *[f"--cache_features={project / 'cache'}"] * cache) == 0
        assert do("eval", world, project, *flags) == 0
        records = [json.loads(line) for line in (project / "eval/all.jsonl").read_text().splitlines()]
        written[name] = last(project), [[r[key] for key in ("id", "hypothesis", "score", "seconds")] for r in records]
    assert equal(written["cut"][0], written["files"][0])
    assert written["cut"][1] == written["files"][1]


# --- bad samples -----------------------------------------------------------------------------------------------------


@pytest.fixture
def flawed(world, tmp_path):
    """A manifest of 8 good utterances, an empty file, a missing one, a long one, one without a word, odd names."""
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "long.wav", np.zeros(16000 * 5), 16000)
    good = [{"audio": str(path), "text": text} for path, text in world.utterances[:8]]
    bad = [
        {"audio": "empty.wav", "text": "abc"},
        {"audio": "missing.wav", "text": "abc"},
        {"audio": "long.wav", "text": "abc"},
        {"audio": str(world.utterances[8][0]), "text": "  ", "id": "wordless"},
        {"audio": str(world.utterances[8][0]), "text": "abc", "offset": 0.5, "duration": 60, "id": "overrun"},
    ]
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    bad += [{"audio": name, "text": "abc"} for name in ("loop.wav", "nul\0.wav", "caf\udce9.wav")]
    path = tmp_path / "flawed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (*good, *bad)))
    return path


REASONS = {"empty.wav": "empty", "missing.wav": "no such file", "long.wav": "--ctx_len 40", "wordless": "no tokens"}
REASONS["overrun"] = "8.wav [60.0 s from 0.5 s]: "
REASONS |= dict.fromkeys(("loop.wav", r"nul\x00.wav", r"caf\udce9.wav"), "")  # whatever the system says


@pytest.mark.parametrize("bad", REASONS)
def test_a_bad_sample_stops_the_run_by_its_name(world, flawed, tmp_path, monkeypatch, capsys, bad):
    lines = flawed.read_text().splitlines()
    kept = [*lines[:8], lines[8 + list(REASONS).index(bad)]]
    flawed.write_text("\n".join(kept))
    flags = [*world.flags, *QUICK, f"--data={flawed}", f"--proj_dir={tmp_path / 'out'}", "--ctx_len=40"]
    status, printed = at_door(monkeypatch, capsys, *flags)
    assert status == 2
    (line,) = [line for line in printed.err.splitlines() if line.startswith("train.py: ")]
    assert bad in line
    assert REASONS[bad] in line
    assert "--on_bad_audio skip" in line
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("cache", [False, True], ids=["", "frames-cached"])
def test_skipped_samples_are_counted_listed_and_reported(world, flawed, tmp_path, caplog, cache):
    caplog.set_level("INFO", "rwkv_speech")
    flags = [f"--data={flawed}", "--ctx_len=40", "--on_bad_audio=skip", "--micro_bsz=1", "--epoch_count=2"]
    flags += [f"--cache_features={tmp_path / 'cache'}"] * cache
    assert do("train", world, tmp_path / "out", *flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/bad_audio.jsonl").read_text().splitlines()]
    assert len(lines) == len(REASONS)
    found = {line["id"]: line["reason"] for line in lines}
    for name, reason in REASONS.items():
        assert reason in found[name]
    assert caplog.records[-1].getMessage().startswith("8 bad samples skipped, listed in ")
    assert max(info["step"] for _, info in missions(tmp_path / "out").values()) == 32, "a step of none is a step"
    for x in last(tmp_path / "out").values():
        assert x.isfinite().all()


def test_a_run_of_bad_samples_alone_is_no_success(world, flawed, tmp_path):
    flawed.write_text("\n".join(flawed.read_text().splitlines()[8:10]))
    with pytest.raises(UserError, match=r"nothing was learnt: no sample could be used; .*/bad_audio\.jsonl says why"):
        do("train", world, tmp_path / "out", f"--data={flawed}", "--on_bad_audio=skip", "--epoch_count=1")
    assert len((tmp_path / "out/bad_audio.jsonl").read_text().splitlines()) == 2


def test_what_a_folder_lacks_stops_the_run_or_is_left_out(trained, world, librispeech, tmp_path, capsys):
    shutil.copytree(librispeech / "test-clean", tmp_path / "part")
    chapter = tmp_path / "part" / "2" / "7"
    (chapter / "2-7-0001.flac").rename(chapter / "2-7-0009.flac")
    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("eval", "checkpoints"))
    for op in ("train", "eval"):
        flags = ["--data=librispeech", f"--data_dir={tmp_path / 'part'}", "--epoch_count=1", "--max_new_tokens=5"]
        with pytest.raises(UserError, match=r"without an audio file: 1 \(2-7-0001\), .* line: 1 \(2-7-0009\)"):
            do(op, world, tmp_path / "out", *flags)
        assert do(op, world, tmp_path / "out", *flags, "--on_bad_audio=skip") == 0
        lines = [json.loads(line) for line in (tmp_path / "out/bad_audio.jsonl").read_text().splitlines()]
        assert sorted(line["id"] for line in lines) == ["2-7-0001", "2-7-0009"]
    (split,) = json.loads((tmp_path / "out/eval/summary.json").read_text())["splits"].values()
    assert (split["utterances"], split["left_out"]) == (4, 1)


def test_columns_of_tables_and_a_plus_in_their_path(trained, world, tmp_path):
    rows = [f"{path}\t{text}\t{text[::-1]}\n" for path, text in world.utterances[:3]]
    for place in ("c++ talks/one.tsv", "two.tsv"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("".join(["clip\there\tthere\n", *rows]))
    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("eval", "checkpoints"))
    splits = f"--eval_split={tmp_path}/c++ talks/one.tsv+{tmp_path}/two.tsv"
    flags = [splits, "--audio_column=clip", "--text_column=there", "--max_new_tokens=5"]
    assert do("eval", world, tmp_path / "out", *flags) == 0
    assert do("train", world, tmp_path / "out", splits.replace("eval", "train"), *flags[1:], "--epoch_count=1") == 0
    for name in ("one", "two"):
        (records,) = (tmp_path / "out/eval").glob(f"{name}*.jsonl")
        references = [json.loads(line)["reference"] for line in records.read_text().splitlines()]
        assert references == [text[::-1] for _, text in world.utterances[:3]]


def test_a_killed_reader_ends_the_run_with_one_line(world, tmp_path, monkeypatch, capsys):
    main, plain = os.getpid(), Recording.waveform

    def waveform(self, longest=None):
        if os.getpid() != main and self.source.name == "7.wav":
            os.kill(os.getpid(), signal.SIGBUS)  # as where /dev/shm is full
        return plain(self, longest)

    monkeypatch.setattr(Recording, "waveform", waveform)
    status, printed = at_door(monkeypatch, capsys, *world.flags, *QUICK, f"--proj_dir={tmp_path}", "--num_workers=1")
    assert status == 2
    (line,) = [line for line in printed.err.splitlines() if line.startswith(("train.py: ", "Traceback"))]
    assert "a process that reads audio" in line


CONVOLUTIONS = {
    "wavlm": [(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2],
    "w2v-bert": [(400, 160), (2, 2)],
    "whisper": [(1, 320)],
}


@pytest.mark.parametrize("convolutions", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("ctx_len", [1, 7, 2048])
def test_only_what_has_no_room_is_left_undecoded(convolutions, k, ctx_len):
    encoder, adapter = AbsentEncoder("x", width=4, convolutions=convolutions), Adapter(4, 4, downsample_k=k, hidden=4)
    options = TrainingOptions(ctx_len=ctx_len, max_batch_s=ctx_len)
    longest = longest_of(options, SimpleNamespace(speech_encoder=encoder, adapter=adapter))

    def positions(samples):
        return adapter.group_count(encoder.frame_count(samples)) + 1  # the separator

    assert ctx_len < positions(longest.samples + 1)
    assert positions(longest.samples) <= ctx_len + 3
    assert longest_of(options, SimpleNamespace(speech_encoder=encoder, adapter=adapter), 0.9).seconds <= 0.9 * ctx_len


def test_what_is_no_file_is_a_bad_sample_everywhere(world, tmp_path, monkeypatch, capsys):
    """In caching and training, in evaluation, and in prediction, where each is a line; and so is what is too long."""
    soundfile.write(tmp_path / "long.wav", np.zeros(16000 * 5), 16000)
    paths = {"long": tmp_path / "long.wav"}
    for kind in NO_FILES:
        (tmp_path / kind).mkdir()
        paths[kind] = no_file(tmp_path / kind, kind)
    manifest = tmp_path / "special.jsonl"
    lines = [{"audio": str(path), "text": "abc", "id": id} for id, path in paths.items()]
    lines += [{"audio": str(path), "text": text} for path, text in world.utterances[:4]]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [f"--data={manifest}", "--on_bad_audio=skip", "--epoch_count=1", f"--valid_split={manifest}"]
    flags += ["--max_new_tokens=4", f"--cache_features={tmp_path / 'cache'}", "--ctx_len=40"]
    assert do("train", world, tmp_path / "out", *flags) == 0
    found = [json.loads(line) for line in (tmp_path / "out/bad_audio.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in found) == sorted(paths)
    reasons = {line["id"]: line["reason"] for line in found}
    assert reasons["long"].endswith("long.wav: lasts 5 s, more than the 4.2 s that --ctx_len 40 leaves")

    assert do("eval", world, tmp_path / "out", f"--data={manifest}", "--on_bad_audio=skip", "--max_new_tokens=4") == 0
    found = [json.loads(line) for line in (tmp_path / "out/bad_audio.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in found) == sorted(paths), "once each, for the same reason"
    assert len((tmp_path / "out/eval/all.jsonl").read_text().splitlines()) == 5

    del paths["folder"], paths["nul"]  # one stands for its files, the other can't come from a shell
    flags = [
        "--op=predict",
        f"--proj_dir={tmp_path / 'out'}",
        "--max_new_tokens=4",
        *world.flags[:1],
        "--accelerator=cpu",
    ]
    status, printed = at_door(monkeypatch, capsys, *flags, "--file_path", *paths.values(), world.utterances[0][0])
    assert (status, len(printed.out.splitlines())) == (1, 2)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        pytest.param(["--load_model=/no/model.pth"], ["/no/model.pth", "does not exist"], id="no-model"),
        pytest.param(["--encoder=/no/encoder"], ["/no/encoder", "no such folder"], id="no-encoder"),
        pytest.param(["--data=/no/data"], ["/no/data", "no such folder"], id="no-folder"),
        pytest.param(["--data=/no/data.jsonl"], ["/no/data.jsonl"], id="no-manifest"),
        pytest.param(["--accelerator=gpu"], ["--accelerator gpu", "no GPU"], id="no-gpu"),
        pytest.param(["--n_embd=2048"], ["--n_embd 2048", "64"], id="n_embd"),
        pytest.param(["--n_layer=24"], ["--n_layer 24", "2"], id="n_layer"),
        pytest.param(["--adapter=/no/mission.pth"], ["/no/mission.pth"], id="no-mission-file"),
        pytest.param(["--op=eval"], ["no mission file", "train first"], id="nothing-to-evaluate"),
        pytest.param(["--op=eval", "--adapter=~/no.pth"], ["no.pth"], id="no-mission-file-to-evaluate"),
        pytest.param(["--op=predict"], ["--file_path"], id="nothing-to-predict"),
        pytest.param(["--train_split=train"], ["train"], id="split-of-a-manifest"),
        pytest.param(["--data_dir=."], ["--data ", "--data_dir"], id="two-places"),
        pytest.param(["--n_embed=64"], ["--n_embed"], id="unknown-flag"),
        pytest.param(["--n_emb=64"], ["--n_emb"], id="abbreviated-flag"),
        pytest.param(["--micro_bsz=0"], ["micro_bsz", "0"], id="no-batch"),
        pytest.param(["--precision=fp16"], ["fp16", "GPU"], id="fp16-on-a-cpu"),
        pytest.param(["--strategy=ddpp"], ["--strategy ddpp", "ddp,"], id="unknown-strategy"),
        pytest.param(["--devices=0,1", "--accelerator=cpu"], ["--devices [0, 1]", "cpu"], id="gpus-of-a-cpu"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="expects a machine without GPUs")
def test_a_mistake_is_one_line_and_status_2(world, tmp_path, monkeypatch, capsys, flags, said):
    project = tmp_path / "out"
    status, printed = at_door(monkeypatch, capsys, f"--proj_dir={project}", *world.flags, *QUICK, *flags)
    assert (status, printed.out) == (2, "")
    (line,) = [line for line in printed.err.splitlines() if line.startswith("train.py: ")]
    for part in said:
        assert part in line
    assert "Traceback" not in printed.err
    assert not project.exists(), "a mistake must leave nothing behind"


def test_the_real_door_says_it_on_standard_error(world, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--load_model", "/no/model.pth", f"--proj_dir={tmp_path}"]
    done = subprocess.run([*command, *world.flags[2:]], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train\.py: /no/model\.pth: does not exist; .*", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


# --- RWKV-7 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def goose(world, tmp_path_factory):
    """The world with a random RWKV-7 of 2 x 64 for its language model."""
    path = tmp_path_factory.mktemp("goose") / "rwkv7.pth"
    sizes = official_sizes(generation=7, n_layer=2, n_embd=64, vocab_size=257, head_size=32)
    torch.save(random_weights(sizes, seed=1), path)
    flags = [f"--load_model={path}" if flag.startswith("--load_model") else flag for flag in world.flags]
    return SimpleNamespace(flags=flags, speech_rwkv=lambda **how: SpeechRWKV.from_pretrained(path, **how))


def test_rwkv7_is_trained_resumed_evaluated_and_used_like_rwkv6(world, goose, tmp_path, cut_power, monkeypatch, capsys):
    flags = ["--epoch_count=2", "--save_steps=4", "--lr_init=1e-2", "--lr_final=1e-2", "--state_lr_scale=10"]
    assert do("train", goose, tmp_path / "whole", *flags) == 0
    curve = losses(tmp_path / "whole")
    assert np.mean([curve[step] for step in range(7, 13)]) < curve[1] - 0.3
    cut_power(6)
    with pytest.raises(PowerCutError):
        do("train", goose, tmp_path / "cut", *flags)
    monkeypatch.undo()
    assert do("train", goose, tmp_path / "cut", *flags) == 0
    assert equal(last(tmp_path / "cut"), last(tmp_path / "whole"))
    assert do("train", goose, tmp_path / "checkpointing", *flags, "--grad_cp=1") == 0
    for name, x in last(tmp_path / "checkpointing").items():
        torch.testing.assert_close(x, last(tmp_path / "whole")[name], atol=1e-4, rtol=0)
    file = max((tmp_path / "whole").glob("*.pth"), key=lambda path: int(path.stem.split("-")[-1]))
    assert json.loads(file.with_suffix(".json").read_text())["generation"] == 7
    assert do("eval", goose, tmp_path / "whole", "--beam=2", "--max_new_tokens=12") == 0
    records = [json.loads(line) for line in (tmp_path / "whole/eval/all.jsonl").read_text().splitlines()]
    audio = [str(path) for path, _ in world.utterances]
    texts = goose.speech_rwkv(adapter=file).transcribe(audio, beam=2, max_new_tokens=12)
    assert [record["hypothesis"] for record in records] == texts
    with pytest.raises(UserError, match=r"states for an RWKV-7, but the language model is an RWKV-6"):
        world.speech_rwkv(adapter=file)


def test_frames_are_standardised_and_mission_files_hold_an_adapter_of_frames_as_they_are(
    world, tmp_path, cut_power, monkeypatch
):
    flags = [*RUN, "--standardise=1", f"--valid_split={world.folder / 'train.jsonl'}", "--lr_init=1e-2"]
    told, tell = [], Adapter.standardise
    monkeypatch.setattr(Adapter, "standardise", lambda self, *measured: told.append(measured) or tell(self, *measured))
    do("train", world, tmp_path / "whole", *flags)
    model = world.speech_rwkv()
    frames = [model.speech_encoder([load_audio(path)])[0][0] for path, _ in world.utterances]
    expected = torch.cat(frames).double()
    for got, want in zip(told[0], (expected.mean(0), expected.std(0, correction=0)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    weights, info = missions(tmp_path / "whole")["rwkv-adapter-12.pth"]
    file = tmp_path / "whole" / "rwkv-adapter-12.pth"
    assert losses_of(world.speech_rwkv(adapter=file), world) == pytest.approx(info["valid_loss"], rel=1e-4)
    do("train", world, tmp_path / "plain", *flags, "--standardise=0")
    assert not equal(weights, last(tmp_path / "plain"))
    cut_power(7)
    with pytest.raises(PowerCutError):
        do("train", world, tmp_path / "cut", *flags)
    monkeypatch.undo()
    monkeypatch.setattr("rwkv_speech.engine.standardise.frame_statistics", None)  # it knows them
    do("train", world, tmp_path / "cut", *flags)
    assert equal(last(tmp_path / "cut"), weights)
    with pytest.raises(UserError, match=r"--standardise 1 is for a new adapter"):
        do("train", world, tmp_path / "more", *flags, f"--adapter={file}")


@torch.no_grad()
def losses_of(model, world):
    """The mean loss of a token, by the model's own forward pass."""
    rows = load_split(str(world.folder / "train.jsonl"))
    batch = model.prepare([model.sample(row) for row in rows])
    return float(model.loss_sum(batch)) / batch.tokens
