"""Where utterances come from: LibriSpeech's layout, manifests, Hugging Face datasets, tables of files."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.data import hub, librispeech
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.hub import DatasetRow
from rwkv_speech.data.listing import audio_files
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.sample import BadSample, Row, fingerprint, one_round
from rwkv_speech.data.sources import load_split, split_names
from rwkv_speech.errors import UserError
from rwkv_speech.speech import identity
from rwkv_speech.speech.audio import AudioError
from rwkv_speech.speech.recording import Recording
from tests.tiny import do

SHARED = Path(__file__).parents[1].parent / "shared" / "speech"


def tone(frequency: float, seconds: float = 0.1) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(16000 * seconds)) / 16000)).astype(np.float32)


def write_tone(path: Path, frequency: float = 440) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(frequency), 16000)
    return path


def encoded_tone(frequency: float) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(frequency), 16000, format="WAV")
    return buffer.getvalue()


def write_chapter(split: Path, speaker: str, chapter: str, texts: list[str], suffix: str = ".flac") -> Path:
    folder = split / speaker / chapter
    ids = [f"{speaker}-{chapter}-{number:04}" for number in range(len(texts))]
    for id in ids:
        write_tone(folder / f"{id}{suffix}")
    lines = "".join(f"{id} {text}\n" for id, text in zip(ids, texts, strict=True))
    (folder / f"{speaker}-{chapter}.trans.txt").write_text(lines)
    return folder


def is_tone(row: Row, frequency: float) -> bool:
    waveform = row.audio.waveform().numpy()
    return waveform.shape == (1600,) and np.abs(waveform - tone(frequency)).max() < 1e-4


# LibriSpeech's layout


@pytest.mark.parametrize(
    ("folder", "split"),
    [("", "test-clean"), ("LibriSpeech", "test-clean"), ("LibriSpeech/test-clean", "test-clean")],
    ids=["parent of LibriSpeech", "folder of splits", "the split itself"],
)
def test_librispeech_is_found_from_each_level(tmp_path, folder, split):
    write_chapter(tmp_path / "LibriSpeech" / "test-clean", "7", "20", ["ON AND ON"])
    write_chapter(tmp_path / "LibriSpeech" / "test-clean", "10", "3", ["IT'S ONE", "TWO  WORDS"])
    write_chapter(tmp_path / "LibriSpeech" / "train-clean-100", "8", "1", ["NOT THIS"])
    utterances = load_split(split, data_dir=str(tmp_path / folder))
    assert [utterance.id for utterance in utterances] == ["10-3-0000", "10-3-0001", "7-20-0000"]
    assert [utterance.text for utterance in utterances] == ["it's one", "two  words", "on and on"]
    assert [utterance.speaker for utterance in utterances] == ["10", "10", "7"]
    assert all(is_tone(utterance, 440) for utterance in utterances)


def test_librispeech_case_joining_and_paths_as_splits(tmp_path):
    write_chapter(tmp_path / "a", "1", "1", ["FIRST"])
    write_chapter(tmp_path / "b", "2", "1", ["SECOND"], suffix=".ogg")
    joined = load_split("b+a", data_dir=str(tmp_path), lower_case=False)
    assert [utterance.text for utterance in joined] == ["SECOND", "FIRST"]
    assert joined[0].audio.waveform().shape == (1600,)
    assert [utterance.text for utterance in load_split(str(tmp_path / "a"))] == ["first"]
    assert [utterance.text for utterance in load_split(None, data_dir=str(tmp_path / "a"))] == ["first"]


def test_librispeech_takes_the_lossless_of_two_formats_and_leaves_hidden_files(tmp_path):
    chapter = write_chapter(tmp_path, "1", "1", ["FIRST"])
    write_tone(chapter / "1-1-0000.mp3")
    write_tone(chapter / "1-1-0000.wav")
    (chapter / "._1-1-0000.flac").write_bytes(b"resource fork")
    (utterance,) = load_split(None, data_dir=str(tmp_path))
    assert utterance.audio.source.name == "1-1-0000.flac"


def test_librispeech_mismatches_are_one_error_or_listed(tmp_path):
    corpus = tmp_path / "corpus"
    chapter = write_chapter(corpus, "1", "1", ["A", "B", "C", "D", "E"])
    for number in (0, 1, 2, 4):
        (chapter / f"1-1-000{number}.flac").unlink()
    stray = write_tone(corpus / "1" / "2" / "1-2-0000.flac")
    with pytest.raises(UserError) as error:
        load_split(None, data_dir=str(corpus))
    assert "transcript lines without an audio file: 4 (1-1-0000, 1-1-0001, 1-1-0002, ...)" in str(error.value)
    assert "audio files without a transcript line: 1 (1-2-0000)" in str(error.value)
    assert "\n" not in str(error.value)

    bad_audio = BadSamples("skip", tmp_path / "bad_audio.jsonl")
    utterances = load_split(None, data_dir=str(corpus), bad_audio=bad_audio)
    assert [utterance.id[-1] for utterance in utterances if utterance.audio.source.exists()] == ["3"]
    assert [utterance.id[-1] for utterance in utterances] == ["0", "1", "2", "3", "4"]  # bad samples when they are read
    (listed,) = [json.loads(line) for line in bad_audio.path.read_text().splitlines()]
    assert listed == {"id": "1-2-0000", "audio": str(stray), "reason": "the audio file has no transcript"}


def test_librispeech_lines_end_at_line_feeds_and_ids_at_blanks_or_tabs(tmp_path):
    chapter = write_chapter(tmp_path, "1", "1", ["", "", "", ""])
    lines = "1-1-0000\tFIRST\n1-1-0001 A\u2028B\u0085C\r\n\r\n1-1-0002 \t D\rE\n1-1-0003"
    (chapter / "1-1.trans.txt").write_bytes(lines.encode())
    texts = [row.text for row in load_split(None, data_dir=str(tmp_path), lower_case=False)]
    assert texts == ["FIRST", "A\u2028B\u0085C", "D\rE", ""]
    (chapter / "1-1.trans.txt").write_bytes(b"1-1-0000 FIRST\n1-1-0001 \xff\n")
    with pytest.raises(UserError, match=r"1-1\.trans\.txt: line 2: can't be read as UTF-8 text"):
        load_split(None, data_dir=str(tmp_path))


def test_librispeech_leaves_what_macos_adds_and_names_what_it_can_not_search(tmp_path, monkeypatch):
    write_chapter(tmp_path / "corpus", "1", "1", ["FIRST"])
    write_chapter(tmp_path / "corpus" / "__MACOSX", "1", "1", ["NOT THIS"])
    closed = write_chapter(tmp_path / "corpus", "2", "1", ["SECOND"])
    scandir = os.scandir

    def refusing(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # the tests may run as root
    with pytest.raises(UserError, match=rf"folders that can't be searched: 1 \({closed}\)"):
        load_split(None, data_dir=str(tmp_path / "corpus"))
    bad_audio = BadSamples("skip", tmp_path / "bad_audio.jsonl")
    assert [row.text for row in load_split(None, data_dir=str(tmp_path / "corpus"), bad_audio=bad_audio)] == ["first"]
    (listed,) = [json.loads(line) for line in bad_audio.path.read_text().splitlines()]
    assert listed == {"id": "1", "audio": str(closed), "reason": "the folder can't be searched (Permission denied)"}


@pytest.mark.skipif(not (SHARED / "LibriSpeech").is_dir(), reason="needs ../shared/speech/LibriSpeech")
def test_real_librispeech():
    utterances = load_split("test-clean", data_dir=str(SHARED / "LibriSpeech"))
    assert [utterance.id for utterance in utterances] == [
        "1089-134686-0000",
        "1089-134686-0001",
        "1089-134691-0000",
        "1089-134691-0001",
    ]
    assert utterances[2].text == "he could wait no longer"
    for utterance in utterances:
        info = soundfile.info(utterance.audio.source)
        assert utterance.audio.waveform().shape == (info.frames,)


@pytest.mark.skipif(
    not (SHARED / "speechocean762-train").is_dir(), reason="needs ../shared/speech/speechocean762-train"
)
def test_real_folder_without_splits():
    utterances = load_split(None, data_dir=str(SHARED / "speechocean762-train"))
    assert len(utterances) == len({utterance.id for utterance in utterances}) == 1340
    assert len({utterance.speaker for utterance in utterances}) == 67
    assert utterances == sorted(utterances, key=lambda utterance: utterance.id)


@pytest.fixture
def openslr(tmp_path, monkeypatch):
    """A folder in place of openslr.org, with the archive of one split; its real hash stands where the true one does."""
    site = tmp_path / "openslr"
    write_chapter(tmp_path / "LibriSpeech" / "dev-clean", "1", "1", ["NEW"])
    site.mkdir()
    with tarfile.open(site / "dev-clean.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "LibriSpeech", "LibriSpeech")
    shutil.rmtree(tmp_path / "LibriSpeech")
    monkeypatch.setattr(librispeech, "URL", site.as_uri())
    digest = hashlib.sha256((site / "dev-clean.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(librispeech.SPLITS, "dev-clean", digest)
    return site


def test_download_fetches_what_is_not_there_and_leaves_what_is(tmp_path, openslr):
    root = tmp_path / "corpus"
    write_chapter(root / "dev-other", "9", "9", ["OWN"])
    (root / ".dev-clean.unpacking" / "LibriSpeech" / "dev-clean" / "half").mkdir(parents=True)
    utterances = load_split("dev-clean+dev-other", data_dir=str(root), download=True)
    assert [utterance.text for utterance in utterances] == ["new", "own"]
    assert utterances[0].audio.source == root / "LibriSpeech" / "dev-clean" / "1" / "1" / "1-1-0000.flac"
    assert sorted(path.name for path in root.iterdir()) == ["LibriSpeech", "dev-other"]


def test_training_downloads_what_it_lacks(world, tmp_path, openslr):
    flags = (f"--data_dir={tmp_path / 'corpus'}", "--train_split=dev-clean", "--epoch_count=1")
    with pytest.raises(UserError, match="no such file or folder"):
        do("train", world, tmp_path / "out", "--data=librispeech", *flags)
    assert do("train", world, tmp_path / "out", "--data=librispeech", *flags, "--download") == 0
    assert (tmp_path / "corpus" / "LibriSpeech" / "dev-clean" / "1" / "1" / "1-1-0000.flac").is_file()


def test_download_errors_are_one_line(tmp_path, openslr):
    archive = openslr / "dev-clean.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"^downloading LibriSpeech dev-clean .*invalid hash value.*$"):
        librispeech.download(["dev-clean"], tmp_path)
    assert not (tmp_path / "LibriSpeech" / "dev-clean").exists()
    with pytest.raises(UserError, match=r"^downloading LibriSpeech test-clean .*No such file.*$"):
        librispeech.download(["test-clean"], tmp_path)
    with pytest.raises(UserError, match="no split 'dev-cleen'"):
        librispeech.download(["dev-cleen"], tmp_path)


# Manifests


def test_manifest_fields_and_paths(tmp_path):
    entries = [
        {"audio": "clips/a.wav", "text": "Grüße\u2028an", "id": "one", "duration": 1, "speaker": "s"},
        {
            "audio_filepath": str(tmp_path / "b.flac"),
            "text": "",
            "language": "de",
            "mission": "m",
            "lang_id": 3,
        },
        {"audio": "c.wav", "answers": ["Paris", "paris, france"], "prompt": "Where?"},
        {"audio": "d.wav", "text": "ja", "answers": ["yes"], "target_language": "de", "transcript": "yes"},
    ]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    path = tmp_path / "my train+dev.jsonl"
    path.write_text("\ufeff" + lines[0] + "\r\n\n" + "\n".join(lines[1:]) + "\n", encoding="utf-8")
    expected = [
        Row("one", "Grüße\u2028an", Recording(tmp_path / "clips" / "a.wav", duration=1.0), speaker="s"),
        Row(str(tmp_path / "b.flac"), "", Recording(tmp_path / "b.flac"), language="de", mission="m"),
        Row("c.wav", "Paris", Recording(tmp_path / "c.wav"), answers=("Paris", "paris, france"), prompt="Where?"),
        Row("d.wav", "ja", Recording(tmp_path / "d.wav"), answers=("yes",), target_language="de", transcript="yes"),
    ]
    assert read_manifest(path) == expected
    assert load_split(None, data=str(path)) == load_split(str(path)) == expected
    write_tone(tmp_path / "clips" / "a.wav", 300)
    assert is_tone(expected[0], 300)
    with pytest.raises(AudioError, match=r"b\.flac"):
        expected[1].audio.waveform()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"audio": "a.wav", "text": "x"', "not JSON"),
        ('["a.wav", "x"]', "a JSON list, not an object"),
        ('{"text": "x"}', "no 'audio'"),
        ('{"audio": "", "text": "x"}', "'audio' is empty"),
        ('{"audio": "a.wav"}', "no 'text'"),
        ('{"audio": "a.wav", "answers": []}', "'answers' is [], not a list of strings"),
        ('{"audio": "a.wav", "text": "x", "answers": [1]}', "'answers' is [1], not a list of strings"),
        ('{"audio": "a.wav", "text": null}', "'text' is None, not a string"),
        ('{"audio": "a.wav", "text": "x", "id": [7]}', "'id' is [7], not a string or a number"),
        ('{"audio": "a.wav", "text": "x", "speaker": true}', "'speaker' is True, not a string or a number"),
        ('{"audio": {"path": "a.wav"}, "text": "x"}', "'audio' is {'path': 'a.wav'}, not a string"),
        ('{"audio": "a.wav", "text": "half \\ud83d"}', "'text' holds half of a pair of surrogates"),
        ('{"audio": "a.wav", "text": "x", "duration": 1' + "0" * 400 + "}", "'duration' is 1000000000"),
        ('{"audio": "a.wav", "text": "x", "duration": 1' + "0" * 5000 + "}", "a number of thousands of digits"),
        ('{"audio": ' * 99999, "JSON nested too deeply"),
        ('{"audio": "a.wav", "sentence": "x", "translation": "y"}', "both 'sentence' and 'translation'; --text_column"),
        ('{"audio": "a.wav", "source": "x", "target": "y"}', "no 'text' among audio, source, target; --text_column"),
        ('{"audio": "a.wav", "text": "x", "duration": "2 s"}', "'duration' is '2 s', not a number"),
        ('{"audio": "a.wav", "text": "x", "duration": NaN}', "'duration' is nan, not a number"),
        ('{"audio": "a.wav", "text": "x", "duration": true}', "'duration' is True, not a number"),
        ('{"audio": "a.wav", "audio_filepath": "b.wav", "text": "x"}', "both 'audio' and 'audio_filepath'"),
        ('{"audio": "a.wav", "text": "x", "offset": -0.5}', "'offset' is -0.5, not a number of seconds"),
        ('{"audio": "a.wav", "text": "x", "offset": true}', "'offset' is True, not a number of seconds"),
        ('{"audio": "a.wav", "text": "x", "offset": 0.5, "duration": 0}', "'duration' is 0, of a segment"),
    ],
)
def test_manifest_names_the_malformed_line(tmp_path, line, problem):
    path = tmp_path / "train.jsonl"
    path.write_text('{"audio": "a.wav", "text": "x"}\n\n' + line)
    with pytest.raises(UserError) as error:
        read_manifest(path)
    assert f"1 malformed line (line 3: {problem}" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("entry", "columns", "row"),
    [
        (
            {"audio_filepath": "a.wav", "text": "x", "offset": 0.0, "speaker": 3, "id": 7},
            {},
            {"id": "7", "speaker": "3"},
        ),
        ({"key": "k", "source": "a.wav", "target": "x"}, {}, {"id": "k"}),
        ({"wav": "a.wav", "transcription": "x", "duration": "1.5"}, {}, {"duration": 1.5}),
        ({"client_id": "c", "path": "a.wav", "sentence": "x", "locale": "de"}, {}, {"speaker": "c", "language": "de"}),
        ({"audio": "a.wav", "path": "b.wav", "text": "x", "sentence": "y", "id": ""}, {}, {}),
        ({"a": "a.wav", "de": "x", "text": "y"}, {"audio_column": "a", "text_column": "de"}, {}),
    ],
    ids=["nemo", "source-target", "wav", "common-voice", "audio-text", "named"],
)
def test_manifest_of_others(tmp_path, entry, columns, row):
    recording = Recording(tmp_path / "a.wav", duration=row.pop("duration", None))
    expected = Row(**{"id": "a.wav", "text": "x", "audio": recording} | row)
    for name, content in {
        "lines.jsonl": f"{json.dumps(entry)}\r" * 2,
        "array.json": json.dumps([entry] * 2, indent=1),
    }.items():
        (tmp_path / name).write_bytes(content.encode())
        assert load_split(str(tmp_path / name), **columns) == [expected, expected]


def test_segments_are_told_apart(tmp_path, monkeypatch):
    """As NeMo writes them: the first one has an offset of 0, as has a row that is a whole file."""
    soundfile.write(tmp_path / "talk.wav", tone(300, 1.0), 16000)
    segments = [(0.0, 0.25), (0.25, 0.5), (0.25, 0.75), (0.5, None)]
    lines = [{"audio_filepath": "talk.wav", "text": "x", "offset": o, "duration": d} for o, d in segments]
    lines += [{"audio_filepath": "talk.wav", "text": "x", "duration": 9}]
    lines += [{"audio_filepath": "other.wav", "text": "x", "offset": 0.0, "duration": 2.5}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    *cut, whole, other = rows = load_split(str(tmp_path / "a.jsonl"))
    assert [row.audio.waveform().shape[0] for row in cut] == [4000, 8000, 12000, 8000]
    assert (whole.id, whole.audio) == ("talk.wav", Recording(tmp_path / "talk.wav", 9.0))
    assert (other.id, other.audio) == ("other.wav", Recording(tmp_path / "other.wav", 2.5))
    assert [row.id for row in cut[1::2]] == ["talk.wav [0.5 s from 0.25 s]", "talk.wav [from 0.5 s]"]
    assert str(cut[1].audio) == f"{tmp_path}/talk.wav [0.5 s from 0.25 s]"
    assert cut[3].audio.seconds() == 0.5
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    known = [
        {row.id for row in rows},
        {row.audio.stamp() for row in rows[:-1]},
        {fingerprint([row], lambda row: one_round("x", [row.audio], "x")) for row in rows},
    ]
    assert [len(names) for names in known] == [6, 5, 6]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[\n{"audio": "a.wav", "text": "x"},\n{"audio": "b.wav" "text": "x"}\n]', "not JSON, .* at line 3, column 19"),
        ('[{"audio": "a.wav", "text": "x"}, 5]', r"1 malformed line \(entry 2: a JSON int, not an object\)"),
        ('["a.wav", "x"]\n["b.wav", "y"]', r"2 malformed lines \(line 1: a JSON list, not an object; line 2"),
        ("[" * 99999, "JSON nested too deeply"),
    ],
)
def test_an_array_of_entries_names_the_malformed_one(tmp_path, content, problem):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=problem):
        read_manifest(tmp_path / "a.json")


def test_names_of_other_bytes_stay_what_they_are(tmp_path):
    name = os.fsdecode(b"caf\xe9\n.wav")
    (tmp_path / "a.jsonl").write_text(json.dumps({"audio": name, "text": "x"}))
    (row,) = read_manifest(tmp_path / "a.jsonl")
    assert os.fsencode(row.audio.source) == os.fsencode(tmp_path) + b"/caf\xe9\n.wav"
    assert row.id == r"caf\udce9\n.wav"
    assert str(row.audio) == f"{tmp_path}/{row.id}"
    bad = BadSamples("skip", tmp_path / "bad_audio.jsonl")
    bad.add([BadSample(row.id, name, "bad")])
    assert os.fsencode(json.loads(bad.path.read_bytes().decode())["audio"]) == b"caf\xe9\n.wav"


def test_manifest_counts_malformed_lines(tmp_path):
    path = tmp_path / "train.json"
    path.write_text("x\n" * 5)
    with pytest.raises(UserError, match=r"5 malformed lines \(line 1: .*line 2: .*line 3: .*; and 2 more\)"):
        read_manifest(path)


# Recordings


def test_recording_is_a_file(tmp_path):
    recording = Recording(write_tone(tmp_path / "a.wav", 300))
    assert str(recording) == str(tmp_path / "a.wav")
    waveform = recording.waveform()
    assert (waveform.dtype, waveform.shape) == (torch.float32, (1600,))
    assert np.abs(waveform.numpy() - tone(300)).max() < 1e-4
    assert recording.seconds() == 0.1


def test_seconds_are_the_datas_where_it_tells(tmp_path):
    assert Recording(write_tone(tmp_path / "a.wav"), duration=0.25).seconds() == 0.25
    assert Recording(tmp_path / "absent.wav", duration=0.0).seconds() == 0.0


@pytest.mark.parametrize("method", [Recording.waveform, Recording.seconds, Recording.read])
def test_recording_that_is_absent_is_named(tmp_path, method):
    recording = Recording(tmp_path / "absent.wav")
    assert recording.stamp() is None
    with pytest.raises(AudioError, match=r"absent\.wav"):
        method(recording)


def test_stamp_stands_for_a_file_until_it_is_rewritten(tmp_path, monkeypatch):
    recording = Recording(write_tone(tmp_path / "a.wav"))
    assert recording.stamp() is None  # one more change within a tick of the clock could leave the same times
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    stamp, before = recording.stamp(), (tmp_path / "a.wav").stat()
    assert Recording(tmp_path / "a.wav").stamp() == stamp is not None
    assert recording.read() == ((tmp_path / "a.wav").read_bytes(), stamp)
    time.sleep(0.02)  # a tick of the file system's clock
    write_tone(tmp_path / "a.wav", 300)
    os.utime(tmp_path / "a.wav", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (tmp_path / "a.wav").stat().st_size == before.st_size
    assert recording.stamp() not in (stamp, None)


# Hugging Face datasets


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def audio_rows(datasets, frequencies, **columns):
    """A dataset as they come with audio inside: `{"bytes", "path"}`, typed as Audio."""
    column = [{"bytes": encoded_tone(frequency), "path": f"{frequency}.wav"} for frequency in frequencies]
    return datasets.Dataset.from_dict({"audio": column, **columns}).cast_column("audio", datasets.Audio())


def test_saved_dataset(tmp_path, datasets):
    rows = audio_rows(datasets, [300, 500], id=["x", "y"], sentence=["One", "Two"], speaker_id=[7, 8])
    rows = rows.add_column("answers", [["One", "1"], []])
    rows.save_to_disk(tmp_path / "saved")
    one, two = load_split(None, data=str(tmp_path / "saved"))
    assert (one.id, one.text, one.speaker, two.speaker) == ("x", "One", "7", "8")
    assert (one.answers, two.answers) == (("One", "1"), None)
    assert is_tone(one, 300)
    assert is_tone(two, 500)
    with pytest.raises(UserError, match="saved without splits"):
        load_split("train", data=str(tmp_path / "saved"))


def test_recording_of_a_row(tmp_path, datasets, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED", -1.0)

    def saved(frequencies: list[int]) -> list[Recording]:
        rows = audio_rows(datasets, frequencies, text=["a", "b", "c"], duration=[0.5, None, None])
        rows.save_to_disk(tmp_path / "saved")
        return [row.audio for row in load_split(None, data=str(tmp_path / "saved"))]

    first, second, _ = recordings = saved([300, 500, 500])
    assert str(second) == f"{tmp_path / 'saved'} row 1"
    assert (first.seconds(), second.seconds()) == (0.5, 0.1)  # the column tells of the first alone
    assert first.read() == (encoded_tone(300), first.stamp())
    stamps = [recording.stamp() for recording in recordings]
    assert len({*stamps, None}) == 4
    again = [row.audio for row in load_split(None, data=str(tmp_path / "saved"))]
    assert [recording.stamp() for recording in again] == stamps
    changed = [recording.stamp() for recording in saved([300, 600, 500])]
    assert not {*changed} & {*stamps, None}


def test_row_that_points_to_a_file_has_the_stamp_of_the_file(tmp_path, datasets, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    paths = [write_tone(tmp_path / "a.wav", 300), tmp_path / "absent.wav"]
    datasets.Dataset.from_dict({"audio": list(map(str, paths)), "text": ["x", "y"]}).save_to_disk(tmp_path / "saved")
    here, absent = (row.audio for row in load_split(None, data=str(tmp_path / "saved")))
    stamp = here.stamp()
    assert stamp == Recording(paths[0]).stamp() is not None
    assert here.read() == (paths[0].read_bytes(), stamp)
    assert absent.stamp() is None
    time.sleep(0.02)  # a tick of the file system's clock
    write_tone(paths[0], 500)
    assert here.stamp() != stamp
    for method in (Recording.waveform, Recording.seconds, Recording.read):
        with pytest.raises(AudioError, match="saved row 1: "):
            method(absent)


def test_saved_splits_and_columns(tmp_path, datasets):
    train = audio_rows(datasets, [300], text=["english"], translation=["deutsch"])
    train = train.rename_column("audio", "clip")
    saved = datasets.DatasetDict({"train": train, "test": train})
    saved.save_to_disk(tmp_path / "saved")
    columns = {"audio_column": "clip", "text_column": "translation"}
    (utterance,) = load_split("test", data_dir=str(tmp_path / "saved"), **columns)
    assert utterance.text == "deutsch"
    assert is_tone(utterance, 300)
    for split, columns, problem in (
        ("dev", {}, "no split 'dev'; there are train, test"),
        (None, {}, "name a split; there are train, test"),
        ("test", {}, "no audio column known by its name .*the columns are clip, text, translation"),
        (
            "test",
            {"audio_column": "clip", "text_column": "words"},
            "no column 'words'; .*are clip, text, trans",
        ),
        ("test", {"audio_column": "clip", "text_column": "clip"}, "column 'clip' holds no text"),
    ):
        with pytest.raises(UserError, match=problem):
            load_split(split, data=str(tmp_path / "saved"), **columns)


def test_parquet_folder_is_decoded_only_on_demand(tmp_path, datasets):
    broken = {"bytes": b"not audio", "path": "broken.wav"}
    rows = datasets.Dataset.from_dict(
        {
            "audio": [{"bytes": encoded_tone(300), "path": None}, broken, {"bytes": None, "path": None}],
            "transcription": ["good", "broken", None],
        }
    ).cast_column("audio", datasets.Audio())
    (tmp_path / "corpus").mkdir()
    rows.to_parquet(tmp_path / "corpus" / "test-00000-of-00001.parquet")
    utterances = load_split("test", data_dir=str(tmp_path / "corpus"))
    assert [utterance.text for utterance in utterances] == ["good", "broken", ""]
    assert all(isinstance(utterance.audio.source, DatasetRow) for utterance in utterances)
    assert is_tone(utterances[0], 300)
    with pytest.raises(AudioError, match="test row 1"):
        utterances[1].audio.waveform()
    with pytest.raises(AudioError, match="test row 2: the row holds no audio"):
        utterances[2].audio.waveform()
    assert len(load_split("test[:2]", data_dir=str(tmp_path / "corpus"))) == 2
    with pytest.raises(UserError, match=r"can't read split val of .*Unknown split"):
        load_split("val", data_dir=str(tmp_path / "corpus"))


def test_ids_that_several_rows_share_name_none_of_them(tmp_path, datasets):
    audio_rows(datasets, [300, 500, 600], id=[1, 2, 1], transcription=["a", "b", "a"]).save_to_disk(tmp_path / "fleurs")
    rows = load_split(None, data=str(tmp_path / "fleurs"))
    assert [row.id for row in rows] == [f"{tmp_path / 'fleurs'} row {index}" for index in range(3)]


@pytest.mark.parametrize("kind", ["script", "parquet", "no-json", "arrow"])
def test_what_datasets_raises_is_one_line(tmp_path, datasets, kind):
    folder = tmp_path / "corpus"
    if kind == "script":
        folder.mkdir()
        (folder / "corpus.py").write_text("raise SystemExit")
    elif kind == "parquet":
        folder.mkdir()
        (folder / "train.parquet").write_bytes(b"PAR1 and no more")
    else:
        audio_rows(datasets, [300], text=["a"]).save_to_disk(folder)
        (spoilt,) = folder.glob("state.json" if kind == "no-json" else "*.arrow")
        spoilt.write_bytes(spoilt.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"^can't read {folder} as a Hugging Face dataset: .") as error:
        load_split(None, data=str(folder))
    assert "\n" not in str(error.value)


def test_columns_of_paths(tmp_path, datasets):
    path = write_tone(tmp_path / "a.wav", 300)
    rows = datasets.Dataset.from_dict({"speech": [str(path)], "text": ["x"]})
    rows.save_to_disk(tmp_path / "saved")
    (utterance,) = load_split(None, data=str(tmp_path / "saved"))
    assert is_tone(utterance, 300)


def test_librispeech_from_the_hub_takes_only_the_split(tmp_path, datasets, monkeypatch):
    folder = tmp_path / "librispeech_asr"
    (folder / "all" / "test.clean").mkdir(parents=True)
    (folder / "all" / "test.other").mkdir()
    rows = audio_rows(datasets, [300], file=["f"], text=["HELLO"], speaker_id=[61], id=["61-70968-0000"])
    rows.to_parquet(folder / "all" / "test.clean" / "0000.parquet")
    (folder / "all" / "test.other" / "0000.parquet").write_bytes(b"opening this fails")
    (folder / "README.md").write_text(
        "---\ndataset_info:\n- config_name: all\n  splits:\n"
        "  - name: test.clean\n    num_bytes: 1\n    num_examples: 2620\n"
        "  - name: test.other\n    num_bytes: 1\n    num_examples: 2939\n"
        "configs:\n- config_name: all\n  default: true\n  data_files:\n"
        "  - split: test.clean\n    path: all/test.clean/*.parquet\n"
        "  - split: test.other\n    path: all/test.other/*.parquet\n---\n"
    )
    monkeypatch.setattr(hub, "LIBRISPEECH", str(folder))
    (utterance,) = load_split("test-clean")
    assert (utterance.id, utterance.text, utterance.speaker) == ("61-70968-0000", "hello", "61")
    assert is_tone(utterance, 300)
    with pytest.raises(UserError, match="no split 'test'; there are train-clean-100"):
        load_split("test")


def test_unreachable_hub_is_one_line(datasets, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'openslr/librispeech_asr' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"^can't read split test.clean of openslr/librispeech_asr .*Hub$"):
        load_split("test-clean")


# Tables of audio files


def write_csv(folder: Path) -> None:
    (folder / "metadata.csv").write_text('file_name,sentence\na.wav,"One, two"\nsub/b.wav,null\n')


def write_jsonl(folder: Path) -> None:
    rows = [{"file_name": "a.wav", "text": "One, two"}, {"file_name": "sub/b.wav", "text": "null"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("write_table", [write_csv, write_jsonl], ids=["csv", "jsonl"])
def test_audio_folder(tmp_path, write_table):
    write_tone(tmp_path / "train" / "a.wav", 300)
    write_tone(tmp_path / "train" / "sub" / "b.wav", 500)
    write_table(tmp_path / "train")
    a, b = load_split("train", data=str(tmp_path))
    assert (a.id, a.text, b.text) == ("a.wav", "One, two", "null")
    assert is_tone(b, 500)
    assert load_split(None, data=str(tmp_path / "train")) == [a, b]
    with pytest.raises(UserError, match="no split 'test'; there are train"):
        load_split("test", data=str(tmp_path))
    with pytest.raises(UserError, match=r"no 'words' among file_name, (sentence|text); --text_column can name another"):
        load_split("train", data=str(tmp_path), text_column="words")


TABLES = {
    "semicolons": ("metadata.csv", 'file_name;text;id;duration;speaker_id\n"a.wav";"x; ""y""";one;0.5;7\n', "", None),
    "tabs": ("metadata.tsv", 'path\tsentence\tid\tduration\tclient_id\na.wav\tx; "y"\tone\t0.5\t7\n', "", None),
    "bars": ("metadata.csv", 'text|id|duration|wav|speaker\r\nx; "y"|one|0.5|a.wav|7\r\n', "", None),
    "common-voice": (
        "dev.tsv",
        'client_id\tpath\tsentence\tid\tduration\n7\ta.wav\tx; "y"\tone\t0.5\n',
        "clips",
        "dev",
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_table_keeps_what_it_holds(tmp_path, kind):
    name, content, folder, split = TABLES[kind]
    path = write_tone(tmp_path / folder / "a.wav", 300)
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    expected = Row("one", 'x; "y"', Recording(path, duration=0.5), speaker="7")
    assert load_split(split, data_dir=str(tmp_path)) == load_split(str(tmp_path / name)) == [expected]
    if split:
        with pytest.raises(UserError, match="no split 'test'; there are dev"):
            load_split("test", data_dir=str(tmp_path))


def test_table_of_ljspeech(tmp_path):
    path = write_tone(tmp_path / "wavs" / "LJ001-0001.wav", 300)
    (tmp_path / "metadata.csv").write_text('LJ001-0001|"Dr." No, 1962|"Doctor" No, sixty-two\n')
    (row,) = load_split(None, data=str(tmp_path))
    assert row == Row("LJ001-0001", '"Dr." No, 1962', Recording(path))
    (row,) = load_split(None, data=str(tmp_path), text_column="normalized_text")
    assert row.text == '"Doctor" No, sixty-two'
    (tmp_path / "metadata.csv").write_text("wavs/LJ001-0001.wav|text\n")
    assert load_split(None, data=str(tmp_path)) == [Row("wavs/LJ001-0001.wav", "text", Recording(path))]


def test_table_whose_ids_are_of_sentences(tmp_path):
    (tmp_path / "metadata.csv").write_text("id,file_name,text\n1,a.wav,x\n1,b.wav,x\n2,c.wav,y\n")
    assert [row.id for row in load_split(None, data=str(tmp_path))] == ["a.wav", "b.wav", "c.wav"]


@pytest.mark.parametrize(
    ("spoilt", "problem"),
    [
        ({3: 'c.wav,"text'}, r"1 malformed line \(line 4: "),
        (
            {3: 'c.wav,"text', 6: 'f.wav,text"'},
            r"1 malformed line \(line 4: a quotation mark makes one .* up to line 7",
        ),
        ({3: 'c.wav,"text', 6: 'f.wav,"text"'}, r"1 malformed line \(line 4: "),
        ({3: 'c.wav,"text" more'}, r"1 malformed line \(line 4: "),
        ({3: "c.wav,text, more"}, r"1 malformed line \(line 4: 3 cells for 2 columns\)"),
        ({3: "c.wav"}, r"1 malformed line \(line 4: 1 cells for 2 columns\)"),
        ({0: "file_name,words"}, "no 'text' among file_name, words; --text_column"),
        ({0: "name,text"}, "no 'audio' among name, text; --audio_column"),
    ],
)
def test_table_names_the_malformed_line(tmp_path, spoilt, problem):
    lines = dict(enumerate(["file_name,text", *(f"{letter}.wav,text" for letter in "abcdefgh")]))
    (tmp_path / "metadata.csv").write_text("\n".join((lines | spoilt).values()))
    with pytest.raises(UserError, match=rf"^{tmp_path / 'metadata.csv'}: {problem}") as error:
        load_split(None, data=str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_text_in_quotes_may_have_several_lines(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,text\na.wav,"one,\ntwo, three"\nb.wav,four\n')
    assert [row.text for row in load_split(None, data=str(tmp_path))] == ["one,\ntwo, three", "four"]


# What a folder holds


def test_audio_files_of_a_folder(tmp_path, caplog):
    caplog.set_level("INFO", "rwkv_speech")
    held = ["a.WAV", "sub/b.mp4", "sub/deeper/c.3gp", "d.w64", "e.aiff", "f.webm", "g.mkv", "h.mov", "i.wma", "j.caf"]
    other = ["._a.wav", ".hidden/k.wav", "__MACOSX/l.wav", "notes.txt"]
    for name in (*held, *other, "../outside/m.flac"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in/link").symlink_to(tmp_path / "outside")
    (tmp_path / "in/sub/round").symlink_to(tmp_path / "in")
    (tmp_path / "in/again").symlink_to(tmp_path / "in/sub")
    (tmp_path / "in/nowhere.wav").symlink_to("nowhere.wav")
    found = [str(path.relative_to(tmp_path / "in")) for path in audio_files(tmp_path / "in")]
    assert set(found) == {*held, "link/m.flac", "nowhere.wav"}
    assert len(found) == len(held) + 2
    (said,) = caplog.messages
    for name in (".hidden", "._a.wav", "__MACOSX", "notes.txt"):
        assert name in said


# What a user can get wrong


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("dev-clean+dev-other", ["dev-clean", "dev-other"]),
        ("one + two", ["one", "two"]),
        ("c++ talks/test.jsonl", ["c++ talks/test.jsonl"]),
        ("one+c++ talks/test.jsonl+two", ["one", "c++ talks/test.jsonl", "two"]),
        ("c++ talks/test.jsonl+c++ talks/test.jsonl", ["c++ talks/test.jsonl"] * 2),
        ("a.jsonl+b.jsonl", ["a.jsonl+b.jsonl"]),
        ("b.jsonl+a.jsonl", ["b.jsonl", "a.jsonl"]),
        ("x+y+one", ["x+y", "one"]),
    ],
)
def test_names_joined_by_plus(tmp_path, monkeypatch, asked, names):
    monkeypatch.chdir(tmp_path)
    Path("c++ talks").mkdir()
    for name in ("c++ talks/test.jsonl", "a.jsonl+b.jsonl"):
        Path(name).touch()
    (tmp_path / "corpus" / "x+y").mkdir(parents=True)
    assert split_names(asked, within="corpus") == names


@pytest.mark.parametrize(
    ("split", "arguments", "problem"),
    [
        ("train", {"data_dir": "missing"}, "no such file or folder: missing"),
        ("missing/train.jsonl", {}, "no such file or folder: missing/train.jsonl"),
        ("train", {"data": "missing.jsonl"}, "is a manifest, without splits"),
        (None, {"data": "missing.jsonl"}, "no such manifest: missing.jsonl"),
        ("train", {"data": "librispech"}, "no such folder: librispech; expected one, or owner/name"),
        ("train", {"data": "./owner/name"}, "no such folder: ./owner/name"),
        ("train", {"data": "corpus", "data_dir": "corpus"}, "both say where the data is"),
        (None, {}, "name a split of LibriSpeech"),
        ("one+", {"data_dir": "corpus"}, "has an empty name"),
        ("two", {"data_dir": "corpus"}, "it has no split 'two'; splits there: one"),
        (None, {"data_dir": "corpus"}, "splits there: one"),
        ("one", {"data_dir": "corpus/one/1"}, "no such file"),
        ("empty", {"data_dir": "corpus"}, "split 'empty' holds no utterances"),
        ("empty.jsonl", {}, "empty.jsonl: it holds no utterances"),
        ("one", {"data_dir": "corpus", "text_column": "text"}, "has no columns"),
        ("dev-clean", {"download": True}, "--download fetches LibriSpeech into a folder: give --data_dir"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, split, arguments, problem):
    monkeypatch.chdir(tmp_path)
    write_chapter(Path("corpus/one"), "2", "1", ["X"])
    os.mkdir("corpus/empty")
    Path("empty.jsonl").touch()
    with pytest.raises(UserError) as error:
        load_split(split, **arguments)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
