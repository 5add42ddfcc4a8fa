"""demo/recipes/missions.*: the manifests of its lines, what the same frames give otherwise, the table, the recipe."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers

from rwkv_speech.data.sources import load_split
from tests.test_recipes import ROOT, cells, whisper

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small set of digits as the recipe reads it: two speakers, one low and one high, each digit twice."""
    folder = tmp_path_factory.mktemp("sets") / "fsdd"
    folder.mkdir()
    lines = {0: [], 1: []}
    for speaker, pitch in (("ann", 300), ("bob", 900)):
        for digit, name in enumerate(DIGITS):
            for take in (0, 1):
                id = f"{digit}_{speaker}_{take}"
                seconds = 0.2 + 0.02 * digit
                wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(8000 * seconds)) / 8000)
                soundfile.write(folder / f"{id}.flac", wave, 8000)
                row = {"audio": f"{id}.flac", "text": name, "id": id, "duration": seconds, "speaker": speaker}
                lines[take].append(json.dumps(row) + "\n")
    for name in ("train", "train-speakers"):
        (folder / f"{name}.jsonl").write_text("".join(lines[0]))
    for name in ("test", "test-speakers"):
        (folder / f"{name}.jsonl").write_text("".join(lines[1]))
    return folder.parent


@pytest.fixture
def missions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo" / "recipes"))
    import missions

    return missions


def digit(recording) -> int:
    return int(recording.source.name[0])


def test_sums_are_those_of_the_digits_in_the_recording(data, missions, tmp_path):
    missions.write_manifests("sums", data, tmp_path)
    rows = load_split(str(tmp_path / "test.jsonl"))
    assert len(rows) == 40
    for row in rows:
        _, first, second = row.id.split("-")
        assert row.text == missions.in_words(int(first[0]) + int(second[0]))
        assert (row.prompt, row.mission, row.speaker) == ("add: ", "answer", first.split("_")[1])
        seconds = (0.2 + 0.02 * int(first[0])) + 0.2 + (0.2 + 0.02 * int(second[0]))
        assert row.audio.seconds() == pytest.approx(seconds, abs=0.002)


def test_conversations_need_what_was_said_before(data, missions, tmp_path):
    missions.write_manifests("rounds", data, tmp_path)
    rows, fresh, typed = (load_split(str(tmp_path / f"{name}.jsonl")) for name in ("test", "test-fresh", "test-text"))
    assert {row.mission for row in rows} == {"converse/sum", "converse/total", "converse/first"}
    for row, alone, text in zip(rows, fresh, typed, strict=True):
        asked, told = ([m.parts[0] for m in row.messages if m.role == role] for role in ("user", "assistant"))
        assert len(asked) == len(told) == 5
        if row.mission.endswith("first"):
            assert (asked[-1], told[-1]) == ("first?", told[0])
            said = [digit(x) for x in asked[:-1]]
            assert told[:-1] == [DIGITS[x] for x in said]
        else:
            said = [digit(x) for x in asked]
            before = [0, *said] if row.mission.endswith("sum") else np.cumsum([0, *said])
            assert told == [missions.in_words(int(x + y)) for x, y in zip(before, said, strict=False)]
        assert alone.messages == row.messages[-2:]
        assert text.messages[-2:] == row.messages[-2:]
        assert [m.parts[0] for m in text.messages[:8:2]] == [DIGITS[x] for x in said[:4]]


def test_beside_conversations_what_is_said_is_learnt_as_a_transcript(data, missions, tmp_path):
    missions.write_manifests("rounds", data, tmp_path)
    said = [row for row in load_split(str(tmp_path / "train.jsonl")) if row.mission == "transcribe"]
    recordings = load_split(str(data / "fsdd" / "train-speakers.jsonl"))
    assert sorted(row.text for row in said) == sorted(row.text for row in recordings for _ in range(2))
    assert all(row.text == DIGITS[digit(row.audio)] for row in said)
    assert all(row.mission.startswith("converse/") for row in load_split(str(tmp_path / "test.jsonl")))


def test_numbers_in_words(missions):
    assert [missions.in_words(n) for n in (0, 19, 20, 21, 45)] == [
        "zero",
        "nineteen",
        "twenty",
        "twenty one",
        "forty five",
    ]


def test_the_constant_answer_is_the_best_of_the_training_half(data, missions):
    texts = ["seven"] * 9 + ["one"] * 6 + ["two"] * 5
    rows = load_split(str(data / "fsdd/train.jsonl"))
    rows = [replace(row, mission="answer", text=text) for row, text in zip(rows, texts, strict=True)]
    assert missions.constant(rows) == "seven"


def test_the_recipe_of_missions(data, world, tmp_path):
    """One line by the launcher; the two voices are told apart by logistic regression."""
    folder = whisper(tmp_path / "whisper")
    project = tmp_path / "a project"
    (project / "whisper").mkdir(parents=True)
    (project / "whisper" / "tiny-3s").symlink_to(folder)  # already as short as it gets
    settings = {"data_dir": str(data), "tiny": str(folder), "load_model": str(world.model), "proj_dir": str(project)}
    settings |= {"lines": "speaker", "epoch_count": "2", "adapter_hidden": "16", "accelerator": "cpu", "COLUMNS": "160"}
    command = ["sh", str(ROOT / "demo/recipes/missions.sh")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "logistic regression 100.0" in done.stdout
    assert "majority 50.0" in done.stdout
    assert cells(done.stdout, "speaker")
    other = subprocess.run(command, env=os.environ | settings | {"lr_init": "3e-3"}, capture_output=True, text=True)
    assert (other.returncode, "was trained with other settings" in other.stderr) == (2, True), other.stderr
    kept = json.loads((project / "table.json").read_text())["speaker"]
    assert kept["logistic regression"][0]["value"] == 1
    assert list(kept) == ["ours", "logistic regression", "majority"]


def test_transcripts_stand_in_the_table_with_both_error_rates(data, missions, tmp_path):
    """Of twenty digits one is taken for another that shares two of its letters: a word of 20, two letters of 80."""
    rows = [replace(row, mission="transcribe") for row in load_split(str(data / "fsdd/test.jsonl"))]
    assert sum(len(row.text) for row in rows) == 80
    (tmp_path / "digits" / "eval").mkdir(parents=True)
    texts = [row.text for row in rows]
    texts[texts.index("five")] = "nine"
    missions.write(tmp_path / "digits" / "eval" / "test.jsonl", rows, texts)
    missions.print_table(tmp_path)
    (wer, cer) = json.loads((tmp_path / "table.json").read_text())["digits"]["ours"]
    assert (wer["name"], wer["value"]) == ("wer", 1 / 20)
    assert (cer["name"], cer["value"]) == ("cer", 2 / 80)


def test_whispers_decoder_writes_no_more_than_can_be_said(data, missions, tmp_path, monkeypatch):
    import baselines

    said = []

    def generate(self, features, *, max_new_tokens, **how):
        said.append(max_new_tokens)
        return torch.zeros(len(features), 1, dtype=torch.long)

    monkeypatch.setattr(transformers.WhisperForConditionalGeneration, "generate", generate)
    monkeypatch.setattr(baselines, "_whisper_vocabulary", lambda name: (str, int))
    rows = load_split(str(data / "fsdd/test.jsonl"))[:8]  # to seven, of 0.34 s
    baselines.whisper_texts(str(whisper(tmp_path / "whisper")), rows)
    assert said == [23]


def test_without_its_data_the_recipe_says_what_it_needs():
    command = ["sh", str(ROOT / "demo/recipes/missions.sh")]
    environment = {name: value for name, value in os.environ.items() if name != "data_dir"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("missions.sh: data_dir is not set")
