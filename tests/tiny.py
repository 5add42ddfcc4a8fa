"""What tests share: a whole world in small, and operations run on it.

The world is a random language model and encoder, and tones with letters for transcripts. Also makes it on disk:
python tests/tiny.py FOLDER
"""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from rwkv_speech.data.sample import Row
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.options import DecodingOptions, Options
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.encoder import import_transformers
from rwkv_speech.speech.recording import Recording

LETTERS = "abcdefghij"
QUICK = ("--num_workers=0", "--warmup_steps=0", "--lr_init=1e-3", "--lr_final=1e-3")


def write_world(folder: Path, *, utterances: int = 24, generation: int = 6) -> list[str]:
    """A model of 2 x 64, a WavLM of width 32 and a manifest in `folder`; the flags that name them.

    Utterance i is 0.5 to 1.2 s of tones, and its transcript a letter for each.
    """
    sizes = official_sizes(generation=generation, n_layer=2, n_embd=64, vocab_size=257, head_size=32)
    torch.save(random_weights(sizes, seed=1), folder / "model.pth")
    _write_encoder(folder / "encoder")
    rng = np.random.default_rng(0)
    with (folder / "train.jsonl").open("w") as manifest:
        for i in range(utterances):
            text = "".join(rng.choice(list(LETTERS), size=rng.integers(2, 6)))
            waveform = np.concatenate([_tone(letter, rng) for letter in text])
            soundfile.write(folder / f"{i}.wav", waveform, SAMPLE_RATE)
            line = {"audio": f"{i}.wav", "text": text, "id": f"u{i}", "duration": len(waveform) / SAMPLE_RATE}
            manifest.write(json.dumps(line) + "\n")
    return [
        f"--load_model={folder / 'model.pth'}",
        f"--encoder={folder / 'encoder'}",
        f"--data={folder / 'train.jsonl'}",
        "--adapter_hidden=32",
        "--accelerator=cpu",
    ]


def _tone(letter: str, rng: np.random.Generator) -> np.ndarray:
    time = np.arange(int(SAMPLE_RATE * 0.25)) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * (200 + 80 * LETTERS.index(letter)) * time)
    return (0.3 * tone + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


def _write_encoder(folder: Path) -> None:
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.WavLMConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    transformers.WavLMModel(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)


NO_FILES = ("fifo", "device", "socket", "folder", "loop", "nul", "overlong", "below-a-file", "not-utf8")


def no_file(folder: Path, kind: str) -> Path:
    """A path, by x.wav in a folder, to what is no file: one of NO_FILES."""
    path = folder / "x.wav"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(folder):  # its path can't be long
            made.bind(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    return {
        "nul": folder / "x.wav\0y",
        "overlong": folder / ("x" * 300 + "x.wav"),
        "below-a-file": Path(__file__, "x.wav"),
        "not-utf8": Path(os.fsdecode(os.fsencode(path) + b"\xff")),
    }.get(kind, path)


def do(op: str, world: Any, project: Path, *flags: str) -> int:
    """Runs an operation on `world.flags`; the later of two equal flags counts."""
    from rwkv_speech.ops import OPS

    options = Options.parse([f"--op={op}", f"--proj_dir={project}", *world.flags, *QUICK, *flags])
    return OPS[op](options)


def answers(model: Any, paths: Iterable[Path], **search: Any) -> list[str]:
    """What a model says of recordings, each by itself and as it is."""
    found = []
    for path in paths:
        batch = model.prepare([model.sample(Row("", None, Recording(path)))])
        found.append(model.text(model.decode(batch, DecodingOptions(**search))[0]))
    return found


def missions(project: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """name -> (tensors, JSON) of the mission files."""
    paths = sorted(project.glob("*.pth"))
    assert [path.with_suffix(".json") for path in paths] == sorted(project.glob("rwkv-adapter-*.json"))
    return {
        path.name: (torch.load(path, weights_only=True), json.loads(path.with_suffix(".json").read_text()))
        for path in paths
    }


def last(project: Path) -> dict[str, Tensor]:
    """The tensors of the mission file of the last step."""
    return max(missions(project).values(), key=lambda file: file[1]["step"])[0]


def losses(project: Path, run: int = 1) -> dict[int, float]:
    """Step -> loss, as TensorBoard has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(project / "tensorboard" / f"run-{run}"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def at_door(monkeypatch: Any, capsys: Any, *flags: Any) -> tuple[int, Any]:
    """The exit status of `train.py`, and what it printed."""
    from train import main

    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    capsys.readouterr()
    status = main()
    return status, capsys.readouterr()


if __name__ == "__main__":
    print(*write_world(Path(sys.argv[1])))
