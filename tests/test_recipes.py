"""demo/recipes: corpora as published, speakers set aside, baselines, the table, a shorter Whisper, on small parts."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
import torch.nn.functional as F

from rwkv_speech.data.sample import Row
from rwkv_speech.data.sources import load_split
from rwkv_speech.errors import UserError
from rwkv_speech.options import Options
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

    alphabet = baselines.BLANK + " 'abcdefghijklmnopqrstuvwxyz"
    letters = torch.eye(len(alphabet)) * 4
    texts = ["so it is", "all is well", "we see", "he fell", "a tall tree", "it is so", "she sells"] * 10
    frames = [
        torch.cat([letters[[alphabet.index(c)] * 2 + [0, 0]] for c in text]) + 0.1 * torch.randn(4 * len(text), 29)
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


# Corpora as they are published


def sound(path: Path, value: float = 0.1, *, samples: int = 1600) -> Path:
    """A recording that is known again by its value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(samples, value), 16000)
    return path


def table(path: Path, *rows: tuple[object, ...], separator: str = "\t") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))


def parquet(path: Path, *rows: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def embedded(folder: Path, name: str, value: float) -> dict[str, object]:
    return {"bytes": sound(folder / name, value).read_bytes(), "path": name}


def write_aishell(folder: Path) -> None:
    spoken = [
        ("BAC009S0002W0122", "而 对 楼市 成交"),
        ("BAC009S0724W0121", "广州市"),
        ("BAC009S0764W0121", "甚至 出现"),
    ]
    for split, (id, _) in zip(("train", "dev", "test"), spoken, strict=True):
        sound(folder / "data_aishell" / "wav" / split / id[6:11] / f"{id}.wav")
    sound(folder / "data_aishell/wav/train/S0002/BAC009S0002W0999.wav")  # without a transcript, as some are
    table(folder / "data_aishell/transcript/aishell_transcript_v0.8.txt", *spoken, separator=" ")


COMMON_VOICE = ("client_id", "path", "sentence_id", "sentence", "sentence_domain", "up_votes", "down_votes", "age",
                "gender", "accents", "variant", "locale", "segment")  # fmt: skip


def write_common_voice(folder: Path) -> None:
    names = [f"common_voice_de_{n}.mp3" for n in (17, 18, 19)]
    for split, name in zip(("train", "dev", "test"), names, strict=True):
        row = ("c0ffee", name, "5e", '"Ja", sagte sie.', "", 2, 0, "", "", "", "", "de", "")
        table(folder / f"{split}.tsv", COMMON_VOICE, row)
        sound(folder / "clips" / name)
    table(folder / "clip_durations.tsv", ("clip", "duration[ms]"), *((name, 4320) for name in names))


def write_fleurs(folder: Path) -> None:
    for split in ("train", "dev", "test"):
        name = f"1000{len(split)}.wav"
        table(folder / f"{split}.tsv", (12, name, "Ja, es regnet.", "ja es regnet", "j a | e s |", 1600, "FEMALE"))
        sound(folder / "audio" / split / name)


def write_fleurs_hub(folder: Path) -> None:
    for split in ("train", "validation", "test"):
        audio = embedded(folder, f"1000{len(split)}.wav", 0.1)
        texts = {"transcription": "ja es regnet", "raw_transcription": "Ja, es regnet."}
        row = {"id": 12, "num_samples": 1600, "path": "x.wav", "audio": audio, **texts, "language": "German"}
        parquet(folder / split / "0000.parquet", row)


SAID = {"train": ("c.mp3", 'He said "go".', "Er sagte \u201egeh\u201c."), "dev": ("d.mp3", "Two", "Zwei"),
        "test": ("e.mp3", "Three", "Drei")}  # fmt: skip


def write_covost(folder: Path, *, divided: bool) -> None:
    for split, (name, said, text) in SAID.items():
        sound(folder / "clips" / name)
        if divided:  # a quotation mark is written with a backslash before it, as pandas does with this style
            row = (name, said.replace('"', r"\""), text, "c0ffee")
            table(folder / f"covost_v2.en_de.{split}.tsv", ("path", "sentence", "translation", "client_id"), row)
    if not divided:
        rows = [(name, text, split.replace("train", "train_covost")) for split, (name, _, text) in SAID.items()]
        table(folder / "covost_v2.en_de.tsv", ("path", "translation", "split"), *rows, ("f.mp3", "Vier", "dev_covost"))
        rows = [("c0ffee", name, said, 2, 0) for name, said, _ in SAID.values()]
        table(folder / "validated.tsv", ("client_id", "path", "sentence", "up_votes", "down_votes"), *rows)


def write_covost_hub(folder: Path) -> None:
    for split, (name, said, text) in zip(("train", "validation", "test"), SAID.values(), strict=True):
        row = {"client_id": "c0ffee", "file": name, "audio": embedded(folder, name, 0.1), "id": name[0]}
        parquet(folder / f"{split}-00000-of-00001.parquet", row | {"sentence": said, "translation": text})


def write_spoken_squad(folder: Path) -> None:
    def paragraph(id: str, *answers: str) -> dict[str, object]:
        found = [{"text": text, "answer_start": 0} for text in answers]
        return {"context": "the rain in spain", "qas": [{"id": id, "question": "Where? ", "answers": found}]}

    articles = [{"title": "Rain", "paragraphs": [paragraph("a", "spain"), paragraph("lost", "rain")]}]
    articles += [{"title": "Empty", "paragraphs": []}] * 8 + [{"title": "Ten", "paragraphs": [paragraph("b", "spain")]}]
    tests = [{"title": "Test", "paragraphs": [paragraph("c", "spain", "in spain", "spain")]}]
    for name, data in (("train", articles), ("test", tests)):
        (folder / f"spoken_{name}-v1.1.json").write_text(json.dumps({"data": data, "version": "1.1"}))
    for n in range(11):  # the order of numbers is not that of names
        sound(folder / "train_wav" / f"0_0_{n}.wav", n / 20)
    for name in ("train_wav/0_1_0.wav", "train_wav/0_1_2.wav", "train_wav/9_0_0.wav", "dev_wav/0_0_0.wav"):
        sound(folder / name)


def write_esc50(folder: Path) -> None:
    rows = [(f"{fold}-100-A-0.wav", fold, 0, "door_wood_knock", True, 100, "A") for fold in (1, 2, 3, 4, 5)]
    head = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
    table(folder / "meta" / "esc50.csv", head, *rows, separator=",")
    for name, *_ in rows:
        sound(folder / "audio" / name)


def write_emodb(folder: Path) -> None:
    for name in ("03a01Fa", "08b02Wc", "12a05Na", "13a07Lb", "11b10Ab", "14a02Ec", "14a04Tc"):
        sound(folder / "wav" / f"{name}.wav")


ONE_OF_EACH = {"train": 1, "valid": 1, "test": 1}
TRANSLATED = {"text": "Zwei", "transcript": "Two", "speaker": "c0ffee", "language": "en", "target_language": "de"}
NORMALISED = {"text": "ja es regnet", "language": "de", "seconds": 0.1}
CASES = {  # what writes it, the folder's name, rows of each split, and what is known of the first row for validation
    "aishell": (write_aishell, "data", ONE_OF_EACH, {"text": "广州市", "language": "zh", "speaker": "S0724"}),
    "common_voice": (
        write_common_voice,
        "de",
        ONE_OF_EACH,
        {"text": '"Ja", sagte sie.', "language": "de", "speaker": "c0ffee", "seconds": 4.32},
    ),
    "fleurs": (write_fleurs, "de_de", ONE_OF_EACH, NORMALISED),
    "fleurs hub": (write_fleurs_hub, "de_de", ONE_OF_EACH, NORMALISED),
    "covost": (lambda folder: write_covost(folder, divided=False), "en", ONE_OF_EACH, TRANSLATED),
    "covost divided": (lambda folder: write_covost(folder, divided=True), "en", ONE_OF_EACH, TRANSLATED),
    "covost hub": (write_covost_hub, "en_de", ONE_OF_EACH, TRANSLATED),
    "spoken_squad": (
        write_spoken_squad,
        "squad",
        ONE_OF_EACH,
        {"id": "b", "text": "spain", "prompt": "Where?", "answers": ("spain",), "language": "en"},
    ),
    "esc50": (
        write_esc50,
        "ESC-50-master",
        {"train": 3, "valid": 1, "test": 1},
        {"text": "door wood knock", "seconds": 5},
    ),
    "emodb": (write_emodb, "emodb", {"train": 2, "valid": 2, "test": 3}, {"text": "neutral", "speaker": "12"}),
}
MISSIONS = {"covost": "translate", "spoken_squad": "answer", "esc50": "label", "emodb": "label"}


@pytest.fixture
def prepare(monkeypatch):
    """The function of this name."""
    monkeypatch.syspath_prepend(str(RECIPES))
    from prepare import prepare

    return prepare


@pytest.mark.parametrize("case", CASES)
def test_a_corpus_as_it_is_published_becomes_manifests(case, tmp_path, prepare):
    write, name, counts, known = CASES[case]
    folder, corpus = tmp_path / name, case.split()[0]
    folder.mkdir()
    write(folder)
    for _ in range(2):
        manifests = prepare(corpus, folder, tmp_path / "out")
        splits = {split: load_split(str(path)) for split, path in manifests.items()}
        assert {split: len(rows) for split, rows in splits.items()} == counts
    rows = [row for split in splits.values() for row in split]
    assert {row.mission for row in rows} == {MISSIONS.get(corpus, "transcribe")}
    assert len({row.id for row in rows}) == len(rows)
    assert {len(row.audio.waveform()) for row in rows} == {1600} | ({11 * 1600} if corpus == "spoken_squad" else set())
    first: Row = splits["valid"][0]
    assert {key: first.audio.duration if key == "seconds" else getattr(first, key) for key in known} == known
    if corpus == "covost":
        assert splits["train"][0].transcript == 'He said "go".'
    if corpus == "spoken_squad":
        assert splits["test"][0].answers == ("spain", "in spain")
        (whole,) = splits["train"]
        expected = np.repeat(np.arange(11) / 20, 1600)
        np.testing.assert_allclose(whole.audio.waveform().numpy(), expected, atol=1e-4)


def test_the_lines_that_use_a_corpus_can_be_given(tmp_path, prepare, monkeypatch, capsys):
    folder = tmp_path / "my sounds"
    write_esc50(folder)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "esc50", str(folder), str(tmp_path / "out")])
    sys.modules["prepare"].main()
    printed = capsys.readouterr().out
    assert "train: 3 rows, 0.00 h" in printed
    train, test = printed.splitlines()[-2:]
    for line, split in ((train, "train"), (test, "test")):
        *settings, shell, launcher = shlex.split(line)
        assert shell == "sh"
        assert (ROOT / launcher).is_file()
        found = dict(setting.split("=", 1) for setting in settings)
        options = Options.parse([f"--{'op' if name == 'OP' else name}={value}" for name, value in found.items()])
        assert load_split(getattr(options.data, "train_split" if split == "train" else "eval_split"))


def test_librispeech_is_read_as_it_is(tmp_path, prepare, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "librispeech", "/data/Libri Speech", str(tmp_path / "out")])
    sys.modules["prepare"].main()
    train, test = capsys.readouterr().out.splitlines()[-2:]
    assert "data_dir='/data/Libri Speech' valid_split=dev-clean sh" in train
    assert "data_dir='/data/Libri Speech' sh" in test
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("corpus", "files", "said"),
    [
        ("aishell", (), "aishell_transcript_v0.8.txt: no such file"),
        ("fleurs", (), "nothing of fleurs there"),
        ("covost", (), "nothing of covost there"),
        ("covost", ("covost_v2.en_de.tsv", "covost_v2.en_ar.tsv"), "covost_v2.en_ar, covost_v2.en_de; expected one"),
        ("esc50", ("meta/esc50.csv",), "nothing of esc50 there"),
        ("fleurs", ("train.tsv",), "not as fleurs is published"),
    ],
)
def test_a_folder_without_the_corpus_is_one_line(corpus, files, said, tmp_path, prepare):
    for name in files:
        table(tmp_path / name, ("a", "b"))
    with pytest.raises(UserError, match=re.escape(said)):
        prepare(corpus, tmp_path, tmp_path / "out")


def test_what_is_missing_is_one_line_without_a_traceback(tmp_path):
    done = run("prepare.py", "esc50", str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path}/meta/esc50.csv: no such file; expected a text file\n"


def test_audio_that_was_not_unpacked_is_missed(tmp_path, prepare):
    table(tmp_path / "de_de" / "train.tsv", (12, "1.wav", "Ja.", "ja", "j a |", 1600, "MALE"))
    with pytest.raises(UserError, match=r"1\.wav: no such file; unpack"):
        prepare("fleurs", tmp_path / "de_de", tmp_path / "out")
