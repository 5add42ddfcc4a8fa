"""Evaluation from the flags on: in one process and two, interrupted and resumed, refused."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import train as door
from rwkv_speech.errors import UserError
from rwkv_speech.mission_file import write_mission_file
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops import OPS
from rwkv_speech.options import Options
from rwkv_speech.scoring import RecordWriter
from rwkv_speech.speech.recording import Recording
from tests.tiny import answers

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


# --- long recordings ---


@pytest.fixture(scope="module")
def long(world, missions, tmp_path_factory):
    """A manifest of two recordings, and one of seven in a row with pauses; and a mission file that remembers 1.25 s."""
    folder = tmp_path_factory.mktemp("long")
    parts = [part for path, _ in world.utterances[:7] for part in (soundfile.read(path)[0], np.zeros(8_000))]
    soundfile.write(folder / "long.wav", np.concatenate(parts), 16_000)
    audio = [world.utterances[0][0], world.utterances[1][0], folder / "long.wav"]
    lines = [{"audio": str(path), "text": "a b c", "id": path.stem} for path in audio]
    (folder / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (missions[0], missions[0].with_suffix(".json")):
        shutil.copy(path, folder / f"remembers{path.suffix}")
    info = json.loads((folder / "remembers.json").read_text())
    (folder / "remembers.json").write_text(json.dumps(info | {"trained_audio_s": 1.25}))
    return folder


def records(project, name="all"):
    lines = (project / "eval" / f"{name}.jsonl").read_text().splitlines()
    return {record.pop("id"): record for record in map(json.loads, lines) if record.pop("wall_seconds")}


def test_evaluation_cuts_as_prediction_does(flags, long, voiced, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "rwkv_speech")
    flags = [*flags, f"--adapter={long / 'remembers.pth'}", "--eval_bsz=2", "--max_new_tokens=8"]
    here(flags, tmp_path / "eval", f"--data={long / 'some.jsonl'}", "--perturb")
    cut = "audio of more than 1.25 s is cut in pauses: the longest of its training"
    assert cut in caplog.messages
    found = records(tmp_path / "eval")
    others = [flag for flag in flags if not flag.startswith(("--op", "--data"))]
    capsys.readouterr()
    predicted = ["--op=predict", *others, "--format=json", "--file_path", str(long / "long.wav")]
    assert OPS["predict"](Options.parse(predicted)) == 0
    assert caplog.messages.count(cut) == 2
    whole = json.loads(capsys.readouterr().out)
    assert found["long"]["hypothesis"] == whole["text"]
    segments = whole["segments"]
    empty = sum(not segment["text"] for segment in segments)
    assert found["long"]["details"] == {"pieces": len(segments), "empty_pieces": empty}
    assert len(segments) > 5
    assert found["long"]["seconds"] == soundfile.info(long / "long.wav").duration
    assert f"all: 1 recordings were cut into {len(segments)} pieces; {empty} of these gave no text" in caplog.messages
    probabilities = [segment["average_log_prob"] for segment in segments]
    assert min(probabilities) < found["long"]["score"] < max(probabilities)
    slow = records(tmp_path / "eval", "all-speed-0.9")
    assert slow["long"]["details"]["pieces"] == len(segments)
    assert slow["long"]["hypothesis"] != found["long"]["hypothesis"]

    short = tmp_path / "some.jsonl"
    lines = (long / "some.jsonl").read_text().splitlines(keepends=True)
    short.write_text(lines[0] + lines[1])
    here(flags, tmp_path / "short", f"--data={short}")
    assert records(tmp_path / "short") == {id: found[id] for id in ("0", "1")}, "to the last bit"


def test_what_is_not_known_to_be_short_is_cut_at_30_s(flags, long, missions, tmp_path, caplog):
    """As with a mission file of others; where a length is asked for, that counts."""
    caplog.set_level("INFO", "rwkv_speech")
    here(flags, tmp_path, f"--data={long / 'some.jsonl'}", "--eval_bsz=2")
    assert "audio of more than 30.00 s is cut in pauses: the default" in caplog.messages
    assert not any(record["details"] for record in records(tmp_path).values())
    with pytest.raises(UserError, match=r"max_audio_s was 30\.0, is 2\.0; leave --resume out"):
        here(flags, tmp_path, f"--data={long / 'some.jsonl'}", "--resume", "--max_audio_s=2")


def test_a_long_recording_without_speech_or_with_damage(flags, long, tmp_path):
    silent, damaged = tmp_path / "silent.wav", tmp_path / "damaged.wav"
    soundfile.write(silent, np.zeros(50_000), 16_000)
    damaged.write_bytes((long / "long.wav").read_bytes()[:200_000])
    manifest = tmp_path / "some.jsonl"
    lines = [{"audio": str(path), "text": "a", "id": path.stem} for path in (silent, damaged)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [*flags, f"--adapter={long / 'remembers.pth'}", f"--data={manifest}"]
    with pytest.raises(UserError, match=r"bad sample damaged: .*damaged\.wav: cut off or damaged"):
        here(flags, tmp_path / "stop")
    here(flags, tmp_path / "skip", "--on_bad_audio=skip")
    (record,) = map(json.loads, (tmp_path / "skip/eval/all.jsonl").read_text().splitlines())
    assert (record["hypothesis"], record["score"], record["details"]) == ("", None, {"pieces": 0, "empty_pieces": 0})
    summary = json.loads((tmp_path / "skip/eval/summary.json").read_text())
    assert summary["splits"]["all"]["left_out"] == 1
    manifest.write_text(json.dumps(lines[1]))
    with pytest.raises(UserError, match=r"all: none of its 1 samples can be used; .*/bad_audio\.jsonl says why"):
        here(flags, tmp_path / "none", "--on_bad_audio=skip")


@pytest.mark.parametrize("seconds", ["1.3", -1, 0, True])
def test_a_length_that_is_none_is_named(flags, long, tmp_path, seconds):
    for suffix in (".pth", ".json"):
        shutil.copy(long / f"remembers{suffix}", tmp_path / f"m{suffix}")
    info = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps(info | {"trained_audio_s": seconds}))
    with pytest.raises(UserError, match=r"m\.json: trained_audio_s is .*, expected seconds"):
        here(flags, tmp_path, f"--adapter={tmp_path / 'm.pth'}")


def test_a_killed_worker_ends_the_evaluation_with_one_line(flags, tmp_path, monkeypatch, capsys):
    main, plain = os.getpid(), Recording.waveform

    def waveform(self, longest=None):
        if os.getpid() != main and self.source.name == "7.wav":
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, longest)

    monkeypatch.setattr(Recording, "waveform", waveform)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, f"--proj_dir={tmp_path}", "--num_workers=1"])
    assert door.main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("train.py", "Traceback"))]
    assert "a process that reads audio" in line


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


def manifest_of(folder, world, audio):
    """A manifest `all.jsonl` with the transcripts and ids of the first six recordings of the world."""
    path = folder / "all.jsonl"
    path.parent.mkdir(parents=True)
    lines = [
        {"audio": str(x), "text": text, "id": f"u{i}"}
        for i, (x, (_, text)) in enumerate(zip(audio, world.utterances, strict=False))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def hypotheses(project):
    return [json.loads(line)["hypothesis"] for line in (project / "eval" / "all.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def truth(world, missions):
    """What the model says of recordings, asked for one by one."""
    model = world.speech_rwkv(adapter=missions[0])
    return lambda audio: answers(model, audio, max_new_tokens=50)


def test_records_of_other_recordings_count_for_nothing(world, flags, truth, tmp_path, cut_power):
    """Ids and transcripts are the same: another folder, a file that was recorded anew, another column of a dataset."""
    clean, noisy = [path for path, _ in world.utterances[:6]], [path for path, _ in world.utterances[6:12]]
    said = {True: truth(clean), False: truth(noisy)}
    assert sum(a != b for a, b in zip(said[True], said[False], strict=True)) > 3, "the case is void"
    project, more = tmp_path / "project", f"--eval_split={manifest_of(tmp_path / 'clean', world, clean)}"
    here(flags, project, more)
    assert hypotheses(project) == said[True]
    more = f"--eval_split={manifest_of(tmp_path / 'noisy', world, noisy)}"
    here(flags, project, "--resume", more)
    assert hypotheses(project) == said[False]

    own = [shutil.copy(path, tmp_path / f"{i}.wav") for i, path in enumerate(clean)]
    more = f"--eval_split={manifest_of(tmp_path / 'own', world, own)}"
    here(flags, project, "--resume", more)
    shutil.copy(noisy[4], own[4])
    cut_power(2)  # the second batch would fail: one recording is all that is left to do
    here(flags, project, "--resume", more)
    cut_power(100)
    assert hypotheses(project) == [*said[True][:4], said[False][4], said[True][5]]

    datasets = pytest.importorskip("datasets")
    cells = {name: [{"bytes": path.read_bytes(), "path": None} for path in audio]
             for name, audio in (("clean", clean), ("noisy", noisy))}  # fmt: skip
    texts = {"text": [text for _, text in world.utterances[:6]], "id": [f"u{i}" for i in range(6)]}
    saved = datasets.Dataset.from_dict(cells | texts)
    for name in cells:
        saved = saved.cast_column(name, datasets.Audio(decode=False))
    saved.save_to_disk(tmp_path / "saved")
    project = tmp_path / "columns"
    for column in ("clean", "noisy"):
        here(flags, project, f"--data={tmp_path / 'saved'}", f"--audio_column={column}", "--resume")
        assert hypotheses(project) == said[column == "clean"]
    cut_power(1)
    here(flags, project, f"--data={tmp_path / 'saved'}", "--audio_column=noisy", "--resume")


@pytest.mark.parametrize("part", ["load_model", "encoder", "adapter"])
def test_a_part_with_other_weights_under_its_old_name_is_noticed(world, flags, tmp_path, missions, part):
    if part == "adapter":
        places = {"adapter": Path(shutil.copy(missions[0], tmp_path / "0.pth"))}
        shutil.copy(missions[0].with_suffix(".json"), tmp_path)
    else:
        place = world.model if part == "load_model" else Path(world.encoder)
        copied = tmp_path / place.name
        places = {part: shutil.copy(place, copied) if place.is_file() else shutil.copytree(place, copied)}
    flags = [
        *flags,
        f"--{part}={places[part]}",
        f"--eval_split={manifest_of(tmp_path / 'few', world, [world.utterances[0][0]])}",
    ]
    here(flags, tmp_path / "project")
    if part == "encoder":
        from safetensors.torch import load_file, save_file

        tensors = load_file(copied / "model.safetensors")
        save_file(
            {name: x * 1.5 for name, x in tensors.items()}, copied / "model.safetensors", metadata={"format": "pt"}
        )
    else:
        torch.save({name: x * 1.5 for name, x in torch.load(places[part]).items()}, places[part])
    with pytest.raises(UserError, match=rf"--resume, but .* another one: {part}\S* was .*, is .*; leave --resume out"):
        here(flags, tmp_path / "project", "--resume")


def test_samples_are_counted_and_never_inferred(flags, tmp_path, monkeypatch):
    """What another process takes away is no bad sample."""
    plain = SpeechRWKV.decode

    def decode(self, *args, **how):
        (path,) = (tmp_path / "eval" / "unfinished" / "all").iterdir()
        if len(path.read_bytes().splitlines()) == 5:
            os.truncate(path, 0)
        return plain(self, *args, **how)

    monkeypatch.setattr(SpeechRWKV, "decode", decode)
    with pytest.raises(UserError, match="lacks records that this evaluation has written"):
        here(flags, tmp_path)
    assert not (tmp_path / "eval" / "summary.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 3, "finished": []}', '{"settings": {}}'])
def test_a_damaged_ledger_is_one_line(flags, whole, tmp_path, content):
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "eval" / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json is damaged; leave --resume out"):
        here(flags, tmp_path / "copy", "--resume")


def test_splits_that_are_named_by_dots_are_named_by_what_they_mean(librispeech, flags, tmp_path, monkeypatch):
    flags = [flag for flag in flags if not flag.startswith("--data")]
    for place, split in (
        ("test-other/3", "../"),
        ("test-other", "./"),
        ("test-clean", "../test-clean/../test-other/3/.."),
    ):
        monkeypatch.chdir(librispeech / place)
        here(flags, tmp_path, f"--eval_split={split}", "--max_new_tokens=2")
        names = {path.name for path in (tmp_path / "eval").iterdir()}
        assert names == {"test-other.jsonl", "evaluation.json", "summary.json", "report.html"}


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
    with pytest.raises(UserError, match=r"'x' occurs twice in a split, of .*/a\.wav and .*/b\.wav;"):
        here(flags, tmp_path, f"--data={twice}")
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        (folder / "dev.jsonl").write_text('{"audio": "a.wav", "text": "a"}\n')
    with pytest.raises(UserError, match=r"two of the splits would go to eval/dev\.jsonl"):
        here(flags, tmp_path, f"--eval_split={tmp_path}/dev.jsonl+{tmp_path}/other/dev.jsonl")
    assert not (tmp_path / "eval").exists()
