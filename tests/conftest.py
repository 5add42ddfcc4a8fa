"""What the tests of training share: one small world (see tiny.py), written once a session."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported, here and in every process that a test starts: models of this size take longer with two
# threads than with one, much longer where something else runs. test_wkv.py asks for two where they matter.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The rwkv package asks for these whenever a model is made.
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0"}

import pytest
import soundfile
import torch

from rwkv_speech.speech.voice import FRAME
from tests.tiny import write_world

# What takes longest starts first, so that no process is left alone with it at the end.
LONGEST = ["test_quickstart", "test_recipes", "test_engine", "test_evaluate", "test_wkv", "test_train"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@dataclass(frozen=True)
class World:
    """A random RWKV of 2 x 64 (heads of 32, 257 tokens), a random WavLM of width 32, and 24 short recordings.

    folder: holds model.pth, encoder/, train.jsonl and the WAV files that it names.
    flags: `--load_model --encoder --data --adapter_hidden --accelerator` for these.
    """

    folder: Path
    flags: list[str]

    @property
    def model(self) -> Path:
        return self.folder / "model.pth"

    @property
    def encoder(self) -> str:
        return str(self.folder / "encoder")

    @property
    def utterances(self) -> list[tuple[Path, str]]:
        """The recordings and their transcripts."""
        lines = map(json.loads, (self.folder / "train.jsonl").read_text().splitlines())
        return [(self.folder / line["audio"], line["text"]) for line in lines]

    def speech_rwkv(self, **how: Any):
        """A new SpeechRWKV of these parts."""
        from rwkv_speech import SpeechRWKV

        return SpeechRWKV.from_pretrained(self.model, **{"encoder": self.encoder} | how)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("a world")
    return World(folder, write_world(folder))


@pytest.fixture
def voiced():
    """The voice-activity network hears speech wherever there is sound: the world's recordings are tones."""

    def told(samples, memory):
        return torch.stack([frame.abs().max() > 0.05 for frame in samples.split(FRAME)]).float(), memory

    with pytest.MonkeyPatch.context() as patch:  # of its own, which no test undoes
        for user in ("segments", "endpoint"):
            patch.setattr(f"rwkv_speech.speech.{user}.voice_activity", lambda: told)
        yield


@pytest.fixture(scope="session")
def librispeech(world, tmp_path_factory) -> Path:
    """The recordings in LibriSpeech's layout: 16 in train-clean-100, 5 in test-clean, 3 in test-other."""
    root = tmp_path_factory.mktemp("corpus") / "LibriSpeech"
    splits = {"train-clean-100": slice(16), "test-clean": slice(16, 21), "test-other": slice(21, 24)}
    for speaker, (split, part) in enumerate(splits.items(), start=1):
        chapter = root / split / f"{speaker}" / "7"
        chapter.mkdir(parents=True)
        lines = []
        for i, (path, text) in enumerate(world.utterances[part]):
            soundfile.write(chapter / f"{speaker}-7-{i:04}.flac", *soundfile.read(path))
            lines.append(f"{speaker}-7-{i:04} {text.upper()}\n")
        (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines))
    return root
