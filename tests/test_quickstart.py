"""The quick-start: its parts in demo/tiny, and the launcher as a newcomer runs it, only shorter."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).parents[1]
TINY = ROOT / "demo" / "tiny"


def split(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / "corpus" / f"{name}.jsonl").read_text().splitlines()]


def runs_of_words(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def test_the_corpus_is_whole_and_small():
    for name in ("train", "valid", "test"):
        for entry in split(name):
            info = soundfile.info(TINY / "corpus" / entry["audio"])
            assert (info.samplerate, info.channels) == (16_000, 1), entry
            assert info.duration == pytest.approx(entry["duration"], abs=1e-3), entry
    parts = [TINY / "rwkv6-tiny.pth", *TINY.glob("wavlm-tiny/*"), *TINY.glob("corpus/**/*")]
    assert sum(path.stat().st_size for path in parts if path.is_file()) < 25e6


def test_no_held_out_sentence_occurs_in_training():
    held_out = {entry["text"] for name in ("valid", "test") for entry in split(name)}
    assert len(held_out) == 160
    for entry in split("train"):
        assert held_out.isdisjoint(runs_of_words(entry["text"])), entry


@pytest.fixture
def sentences():
    """demo/tiny/make/sentences.py, for small books."""
    spec = importlib.util.spec_from_file_location("sentences", TINY / "make/sentences.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sentences"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    module.COMMON, module.RESERVED, module.VOCABULARY = 2, 60, 12
    module.TEST, module.VALIDATION, module.TRAIN = 5, 5, 20
    yield module
    del sys.modules["sentences"]


def test_sentences_are_reserved(sentences, tmp_path):
    draw = random.Random(0)
    words = list("abcdefghijklmnop")
    weights = range(len(words), 0, -1)
    said = [" ".join(draw.choices(words, weights, k=draw.randint(3, 12))) for _ in range(1500)]
    (tmp_path / "book.txt").write_text("".join(f"{text.capitalize()}!\n" for text in said))
    found = sentences.read_sentences(tmp_path)
    held_out = {*found.test, *found.validation}
    assert (len(found.test), len(found.validation)) == (5, 5)
    assert 10 < len(found.train) <= 20
    assert len(held_out) == 10
    assert held_out <= set(said)
    for text in [*found.train, *found.spoken, *found.text]:
        assert held_out.isdisjoint(runs_of_words(text)), text
    assert set(found.train).isdisjoint(found.spoken)
    frequent = {word for text in [*found.test, *found.train, *found.spoken] for word in text.split()}
    assert frequent == set(words[:12])
    assert sum(map(len, found.text)) > 0.5 * sum(map(len, said)), "most of the book is there"
    assert sentences.read_sentences(tmp_path) == found


def test_the_quickstart(tmp_path):
    mine = TINY / "corpus" / split("valid")[0]["audio"]
    settings = {"epoch_count": "1", "ctc_align_steps": "50", "valid_steps": "80", "max_new_tokens": "40", "beam": "2"}
    environment = os.environ | settings | {"proj_dir": str(tmp_path), "file_path": str(mine), "COLUMNS": "120"}
    command = ["sh", str(ROOT / "demo" / "demo-quickstart.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 2, "a transcript of a test sentence, and of the file given"
    assert {path.name for path in tmp_path.glob("*.pth")} - {"rwkv-adapter-80.pth"} == {"rwkv-adapter-87.pth"}
    for name in ("training.png", "metrics.csv", "eval/report.html", "untrained/eval/summary.json"):
        assert (tmp_path / name).stat().st_size, name
    table = done.stderr[done.stderr.rindex("Synthetic speech") :]
    summaries = [json.loads((tmp_path / x / "eval/summary.json").read_text()) for x in ("untrained", ".")]
    for summary in summaries:
        (scores,) = summary["splits"].values()
        assert f"{scores['raw']['wer']:.1%}" in table
    assert "trained: adapter, state" in table
    assert "frozen: language model" in table
