"""demo/recipes: speakers set aside, baselines, the table, and a shorter Whisper, on small random parts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rwkv_speech.speech.encoder import SpeechEncoder, import_transformers

transformers = import_transformers()

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "demo" / "recipes"


@pytest.fixture
def speakers(librispeech, tmp_path) -> Path:
    """A folder with the three speakers of all splits."""
    folder = tmp_path / "speech"
    folder.mkdir()
    for speaker in librispeech.glob("*/*"):
        (folder / speaker.name).symlink_to(speaker)
    return folder


def run(script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    program = "sh" if script.endswith(".sh") else sys.executable
    environment = os.environ | {"COLUMNS": "160"} | settings
    command = [program, str(RECIPES / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def hypotheses(path: Path, *texts: tuple[str, str]) -> str:
    lines = [{"id": str(i), "reference": ref, "hypothesis": hyp, "seconds": 1.0} for i, (ref, hyp) in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def cells(table: str, name: str) -> list[str]:
    """The rates in the row of that name."""
    (row,) = (line for line in table.splitlines() if re.match(rf"\W*{name}\b", line))
    return re.findall(r"(\d+\.\d|-) ?(?:\(| *│| *$)", row.split(name, 1)[1])


def test_no_speaker_is_on_both_sides(speakers, tmp_path):
    for _ in range(2):
        done = run("split_speakers.py", "--data_dir", str(speakers), "--out", str(tmp_path), "--held_out", "0.3")
        assert done.returncode == 0, done.stderr
        times = [(tmp_path / f"{name}.jsonl").stat().st_mtime_ns for name in ("train", "valid")]
    train, valid = (read(tmp_path / f"{name}.jsonl") for name in ("train", "valid"))
    assert {u["speaker"] for u in train}.isdisjoint(u["speaker"] for u in valid)
    assert len({u["id"] for u in train + valid}) == 24 == len(train + valid)
    met = {u["text"] for u in train}
    assert f"{sum(u['text'] in met for u in valid)} of the utterances" in done.stdout
    assert [(tmp_path / f"{name}.jsonl").stat().st_mtime_ns for name in ("train", "valid")] == times


def test_the_table_tells_known_sentences_apart(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text('{"audio": "a.flac", "text": "red green blue grey"}\n')
    said = ("red green blue grey", "old tree")
    ours = hypotheses(tmp_path / "ours.jsonl", (said[0], said[0]), (said[1], "old"))
    (tmp_path / "others").mkdir()
    hypotheses(tmp_path / "others" / "probe.jsonl", (said[0], "red green"), (said[1], "old tree"))
    done = run("compare.py", "--name", "x", "--train", str(train), f"ours={ours}", str(tmp_path / "others"))
    assert done.returncode == 0, done.stderr
    assert "new sentences, 1" in done.stdout
    assert "met in training, 1" in done.stdout
    assert cells(done.stdout, "ours") == ["16.7", "50.0", "0.0"], "1 of 6 words, 1 of 2, 0 of 4"
    assert cells(done.stdout, "probe") == ["33.3", "0.0", "50.0"], "2 of 6 words, 0 of 2, 2 of 4"


def test_tables_of_different_utterances_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"audio": "a.flac", "text": "one"}\n')
    a = hypotheses(tmp_path / "a.jsonl", ("one", "one"))
    b = hypotheses(tmp_path / "b.jsonl", ("one", "one"), ("two", "two"))
    done = run("compare.py", "--name", "x", "--train", str(tmp_path / "train.jsonl"), f"a={a}", f"b={b}")
    assert done.returncode == 1
    assert "not evaluated on the same utterances" in done.stderr


def test_the_probe_learns_to_spell(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import baselines

    letters = torch.eye(len(baselines.ALPHABET)) * 4
    texts = ["so it is", "all is well", "we see", "he fell", "a tall tree", "it is so", "she sells"] * 10
    frames = [
        torch.cat([letters[[baselines.ALPHABET.index(c)] * 2 + [0, 0]] for c in text])
        + 0.1 * torch.randn(4 * len(text), 29)
        for text in texts
    ]
    probe = baselines.train_probe(frames, texts, 150)
    assert [baselines.spell(probe, x) for x in frames[:7]] == texts[:7]


def test_the_recipe(world, librispeech, speakers, tmp_path):
    settings = {
        "data_dir": str(speakers),
        "encoder": world.encoder,
        "load_model": str(world.model),
        "more_data": str(world.folder / "train.jsonl"),
        "repeat": "2",
        "proj_dir": str(tmp_path / "a project"),
        "epoch_count": "1",
        "epoch_steps": "6",
        "probe_steps": "10",
        "adapter_hidden": "32",
        "beam": "2",
        "max_new_tokens": "10",
        "accelerator": "cpu",
    }
    done = run("real-speech.sh", **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(cells(done.stdout[done.stdout.index("speakers set aside: WER") :], "ours")) == 3
    own, more = (len(read(path)) for path in (tmp_path / "a project/data/train.jsonl", world.folder / "train.jsonl"))
    assert f"training on {2 * own + more} utterances" in done.stderr
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "a project").rglob("*.pth")}
    again = run("real-speech.sh", eval_dir=str(librispeech / "test-clean"), **settings)
    assert again.returncode == 0, again.stderr[-2000:]
    assert len(cells(again.stdout[again.stdout.index("test-clean: WER") :], "ctc-probe")) == 3
    assert {path: path.stat().st_mtime_ns for path in trained} == trained, "nothing is trained twice"
    manifests = {path: path.read_bytes() for path in (tmp_path / "a project" / "data").iterdir()}
    for change in ({"lr_init": "1e-3"}, {"grad_clip": "0.5"}, {"held_out": "0.6"}, {"probe_steps": "11"}):
        other = run("real-speech.sh", **settings | change)
        assert other.returncode == 2, change
        assert "trained with other settings" in other.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in manifests} == manifests, "the speakers set aside are still the same"


def whisper(folder: Path) -> Path:
    """A random Whisper with windows of 2 s."""
    torch.manual_seed(0)
    halves = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in halves.items()}
    config = transformers.WhisperConfig(**sizes, d_model=32, max_source_positions=100, num_mel_bins=20)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=2).save_pretrained(folder)
    return folder


def test_a_shortened_whisper_hears_by_the_same_weights(tmp_path):
    folder = whisper(tmp_path / "whisper")
    done = run("shorten_whisper.py", "--encoder", str(folder), "--seconds", "1", "--out", str(tmp_path / "short"))
    assert done.returncode == 0, done.stderr
    waveform = 0.1 * torch.randn(12_000)
    frames, lengths = SpeechEncoder.from_pretrained(str(tmp_path / "short"))([waveform])
    assert lengths.tolist() == [38]
    # The same by the parts of the whole model, on the first second of its window.
    network = transformers.WhisperModel.from_pretrained(folder).encoder.eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    mel = extractor([waveform.numpy()], sampling_rate=16_000, return_tensors="pt").input_features[:, :, :100]
    with torch.no_grad():
        x = F.gelu(network.conv2(F.gelu(network.conv1(mel)))).transpose(1, 2)
        x = x + network.embed_positions.weight[:50]
        for layer in network.layers:
            x = layer(x, None)
        expected = network.layer_norm(x)[:, :38]
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)


def test_what_cannot_be_shortened(world, tmp_path):
    folder = whisper(tmp_path / "whisper")
    for encoder, seconds, out, said in (
        (folder, "2", tmp_path / "a", "less than 2"),
        (world.encoder, "1", tmp_path / "b", "only Whisper has a window to shorten"),
        (tmp_path / "none", "1", tmp_path / "c", str(tmp_path / "none")),
        (folder, "1", folder, "exists"),
    ):
        done = run("shorten_whisper.py", "--encoder", str(encoder), "--seconds", seconds, "--out", str(out))
        assert done.returncode == 1
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
