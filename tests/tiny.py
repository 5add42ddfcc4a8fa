"""A whole world in small: random language model and encoder, tones with letters for transcripts. For tests of training.

Also makes it on disk:  python tests/tiny.py FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.random_model import write_model  # noqa: E402
from rwkv_speech.lm.initialise import official_sizes  # noqa: E402
from rwkv_speech.speech.audio import SAMPLE_RATE  # noqa: E402
from rwkv_speech.speech.encoder import import_transformers  # noqa: E402

LETTERS = "abcdefghij"


def write_world(folder: Path, *, utterances: int = 24) -> list[str]:
    """A model of 2 x 64, a WavLM of width 32 and a manifest in `folder`; the flags that name them.

    Utterance i is 0.5 to 1.2 s of tones, and its transcript a letter for each.
    """
    sizes = official_sizes(n_layer=2, n_embd=64, vocab_size=257, head_size=32)
    write_model(folder / "model.pth", sizes, dtype=torch.float32, seed=1)
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


if __name__ == "__main__":
    print(*write_world(Path(sys.argv[1])))
