"""Transcripts: their forms against hand-written ones, their order whatever the batch, and `--op predict` on files."""

import itertools
import json
import math
import re
import sys
from unicodedata import combining, east_asian_width

import numpy as np
import pytest
import soundfile
import torch

import train as door
from rwkv_speech.errors import UserError
from rwkv_speech.speech.audio import AudioError, load_audio
from rwkv_speech.speech.segments import AudioSegment, cut
from rwkv_speech.subtitles import Cue, cues
from rwkv_speech.transcription import FORMATS, Alternative, Segment, Transcript, output_files, transcripts

pytestmark = pytest.mark.usefixtures("voiced")

# --- forms -----------------------------------------------------------------------------------------------------------


def segment(start: float, end: float, text: str) -> Segment:
    return Segment(start=start, end=end, text=text, average_log_prob=-0.25)


TALK = Transcript(
    name="talk.flac",
    seconds=360_002.0,
    segments=(
        segment(0.064, 29.824, "so, café\n\nand & so"),
        segment(31.0, 59.9995, ""),
        segment(3599.9996, 3661.5, "1 <b> --> 2"),
        segment(360_000.25, 360_001.0, "the end"),
    ),
)
SILENCE = Transcript(name="silence.wav", seconds=5.0, segments=())

EXPECTED = {
    "text": "so, café and & so 1 <b> --> 2 the end\n",
    "srt": """\
1
00:00:00,064 --> 00:00:07,064
so, café and & so

2
01:00:00,000 --> 01:00:07,000
1 <b> --> 2

3
100:00:00,250 --> 100:00:01,000
the end
""",
    "vtt": """\
WEBVTT

00:00:00.064 --> 00:00:07.064
so, café and &amp; so

01:00:00.000 --> 01:00:07.000
1 &lt;b&gt; --&gt; 2

100:00:00.250 --> 100:00:01.000
the end
""",
}


@pytest.mark.parametrize("form", EXPECTED)
def test_forms(form):
    assert FORMATS[form](TALK) == EXPECTED[form]


def test_json_is_one_line_that_holds_everything():
    line = FORMATS["json"](TALK)
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    assert "café" in line
    content = json.loads(line)
    assert content["name"] == "talk.flac"
    assert content["text"] == "so, café\n\nand & so 1 <b> --> 2 the end"
    assert content["segments"][0] == {
        "start": 0.064,
        "end": 29.824,
        "text": "so, café\n\nand & so",
        "average_log_prob": -0.25,
        "alternatives": [],
    }
    assert len(content["segments"]) == 4


def test_what_a_terminal_would_obey_is_shown_instead():
    """The start of a line cleared and written anew, in C0 and in C1, and the direction of writing reversed."""
    talk = Transcript(name="a\x1b[2K.wav", seconds=1.0, segments=(segment(0.0, 1.0, "so\x1b[2K\x9b2K \u202efdp\x7f"),))
    assert FORMATS["text"](talk) == "so\\x1b[2K\\x9b2K \\u202efdp\\x7f\n"
    for form in FORMATS:
        assert all(c.isprintable() or c == "\n" for c in FORMATS[form](talk)), form
    content = json.loads(FORMATS["json"](talk))
    assert (content["name"], content["text"]) == (talk.name, talk.text)


@pytest.mark.parametrize(
    ("texts", "whole"),
    [
        (["good", "morning"], "good morning"),
        (["今天", "天气很好"], "今天天气很好"),
        (["今日は", "カメラ", "ｶﾒﾗ"], "今日はカメラｶﾒﾗ"),
        (["他说：“好。”", "然后走了"], "他说：“好。”然后走了"),
        (["안녕", "하세요"], "안녕 하세요"),
        (["我用", "Python", "编程"], "我用 Python 编程"),
        (["he said “yes”", "“no”, she said"], "he said “yes” “no”, she said"),
    ],
    ids=["english", "chinese", "japanese", "quotes", "korean", "mixed", "english-quotes"],
)
def test_passages_are_joined_as_the_script_wants(texts, whole):
    segments = tuple(segment(0.0, 1.0, text) for text in ["", *texts])
    assert Transcript(name="", seconds=1.0, segments=segments).text == whole


SENTENCE = (
    "the quick brown fox jumps over the lazy dog and then it goes home to sleep until "
    "the morning comes and everything begins again from the start, as it always has"
)


def test_a_long_passage_is_cut_into_subtitles():
    """159 columns in 11 s are 101 in 7 s, so two lines at a time; 80 of the 159 take 5.535 s."""
    assert cues(SENTENCE, 10.0, 21.0) == [
        Cue(10.0, 15.535, ("the quick brown fox jumps over the lazy", "dog and then it goes home to sleep until")),
        Cue(15.535, 21.0, ("the morning comes and everything begins", "again from the start, as it always has")),
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("今天天气很好我们决定去公园。散步路上遇到朋友", ("今天天气很好我们决定去", "公园。散步路上遇到朋友")),
        ("一二三四五六七八九十一。二三四五六七八九十一", ("一二三四五六七八九十一。", "二三四五六七八九十一")),
    ],
    ids=["in-the-middle", "no-line-begins-with-a-full-stop"],
)
def test_a_passage_without_spaces_is_cut_between_characters(text, lines):
    """22 characters of two columns each."""
    assert cues(text, 0.0, 4.4) == [Cue(0.0, 4.4, lines)]


def columns(line: str) -> int:
    return sum({"W": 2, "F": 2}.get(east_asian_width(c), not combining(c)) for c in line)


@pytest.mark.parametrize("alphabet", ["abcdefg", "今天气。，「」ーゃ", "가나다", "x今é\u0301"])
def test_subtitles_keep_to_the_limits_and_drop_nothing(alphabet):
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.choice([1, 2, 5, 9, 60], size=rng.integers(1, 60))
        text = " ".join("".join(rng.choice(list(alphabet), size=size)) for size in sizes)
        start = round(rng.uniform(0, 1000), 3)
        end = round(start + rng.choice([0.02, 0.5, 3, 10, 30]), 3)
        found = cues(text, start, end)
        lines = [line for cue in found for line in cue.lines]
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert max(map(columns, lines)) <= 42
        assert {len(cue.lines) for cue in found} <= {1, 2}
        times = [time for cue in found for time in (cue.start, cue.end)]
        assert times == sorted(times)
        assert (times[0], times[-1] <= end) == (start, True)
        assert max(round(cue.end - cue.start, 3) for cue in found) <= 7


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("text", "\n"),
        ("json", '{"name": "silence.wav", "text": "", "segments": []}\n'),
        ("srt", ""),
        ("vtt", "WEBVTT\n"),
    ],
)
def test_where_nobody_speaks(form, expected):
    assert FORMATS[form](SILENCE) == expected


def test_files_are_named_after_the_recordings(tmp_path):
    files = output_files(["a/talk.one.flac", "b/x.mp3"], tmp_path, "srt")
    assert files == [tmp_path / "talk.one.srt", tmp_path / "x.srt"]
    assert output_files(["y.wav"], tmp_path, "text") == [tmp_path / "y.txt"]
    with pytest.raises(UserError, match=r"a/x\.flac and b/x\.mp3 would both go to .*x\.vtt"):
        output_files(["a/x.flac", "y.flac", "b/x.mp3"], tmp_path, "vtt")
    with pytest.raises(UserError, match="longer than 255 bytes"):
        output_files([f"{'x' * 251}.wav"], tmp_path, "json")


# --- from recordings, with a model that only names what it was given -------------------------------------------------


class Namer:
    """Says of each waveform its first sample, and takes down the sizes of the batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, waveforms):
        self.batches.append(len(waveforms))
        return [
            [
                Alternative(text=f"{x[0]:.0f}", average_log_prob=-float(x[0])),
                Alternative(text="other", average_log_prob=-99.0),
            ]
            for x in waveforms
        ]


def recording(*firsts: int) -> torch.Tensor:
    """Half a second for each."""
    return torch.cat([torch.full((8_000,), float(first)) for first in firsts])


@pytest.fixture
def halves(monkeypatch):
    """Cuts recordings into halves of a second, whatever they hold."""

    def cut(blocks, *, max_seconds):
        for block in blocks:
            for i, part in enumerate(block.split(8_000)):
                yield AudioSegment(i / 2, part)

    monkeypatch.setattr("rwkv_speech.transcription.cut", cut)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
def test_batches_reach_across_recordings_which_keep_their_order(halves, tmp_path, batch_size):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"no audio")
    audio = [bad, recording(1, 2, 3), recording(4), str(bad), recording(5, 6), torch.zeros(0), recording(7)]
    namer = Namer()
    found = list(transcripts(audio, namer, batch_size=batch_size, max_seconds=30.0))
    texts = [x.text if isinstance(x, Transcript) else type(x) for x in found]
    assert texts == [AudioError, "1 2 3", "4", AudioError, "5 6", AudioError, "7"]
    assert [str(x).partition(":")[0] for x in found if isinstance(x, AudioError)] == [str(bad), str(bad), "audio 5"]
    other = Alternative(text="other", average_log_prob=-99.0)
    expected = Segment(start=0.5, end=1.0, text="2", average_log_prob=-2.0, alternatives=(other,))
    assert found[1].segments[1] == expected
    assert sum(namer.batches) == 7
    assert set(namer.batches[:-1]) <= {batch_size}


def test_a_transcript_comes_as_soon_as_it_is_complete(halves):
    given = []

    def audio():
        for i in range(10):
            given.append(i)
            yield recording(i)

    for done, _ in enumerate(transcripts(audio(), Namer(), batch_size=2, max_seconds=30.0)):
        assert len(given) - done <= 2


def test_what_comes_before_damage_is_not_passed_off_as_the_whole(halves, tmp_path):
    path = tmp_path / "half.wav"
    soundfile.write(path, np.full(40_000, 0.5), 16_000)
    path.write_bytes(path.read_bytes()[:60_000])
    cut_off, good = transcripts([path, recording(1)], Namer(), batch_size=2, max_seconds=30.0)
    assert "cut off or damaged" in str(cut_off)
    assert good.text == "1"


# --- predict ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(world, tmp_path_factory) -> list[str]:
    """Of a mission that was never trained, but says something else of every recording."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("a mission") / "rwkv-adapter-1.pth"
    model = world.speech_rwkv(adapter_hidden=32)
    for block in model.language_model.blocks:
        torch.nn.init.normal_(block.att.time_state)
    torch.save({name: x.detach() for name, x in model.trainable_state_dict().items()}, path)
    chosen = [flag for flag in world.flags if not flag.startswith("--data")]
    return [*chosen, f"--adapter={path}", "--max_new_tokens=8"]


@pytest.fixture
def predict(flags, monkeypatch, capsys):
    """`train.py --op predict`: exit status, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", "--op=predict", *flags, *map(str, arguments)])
        capsys.readouterr()
        status = door.main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def long_file(world, tmp_path):
    """7 recordings with half a second of silence between any two."""
    parts = [part for path, _ in world.utterances[:7] for part in (soundfile.read(path)[0], np.zeros(8_000))]
    soundfile.write(tmp_path / "long.wav", np.concatenate(parts), 16_000)
    return tmp_path / "long.wav"


def test_a_long_file_is_what_its_segments_are_one_by_one(world, flags, predict, long_file):
    found = list(cut([load_audio(long_file)], max_seconds=2.0))
    assert len(found) > 3
    adapter = next(flag for flag in flags if flag.startswith("--adapter=")).partition("=")[2]
    model = world.speech_rwkv(adapter=adapter, adapter_hidden=32)
    texts = [model.transcribe([segment.waveform], max_new_tokens=8)[0] for segment in found]
    assert len(set(texts)) > 1

    short = world.utterances[0][0]
    arguments = ("--max_audio_s=2", "--eval_bsz=3", "--format=json", "--file_path", long_file, short)
    status, out, _ = predict(*arguments)
    assert status == 0
    whole, other = map(json.loads, out.splitlines())
    assert (whole["name"], other["name"]) == (str(long_file), str(short))
    assert [p["text"] for p in whole["segments"]] == texts
    assert [(p["start"], p["end"]) for p in whole["segments"]] == [(round(s.start, 3), round(s.end, 3)) for s in found]
    assert all(p["average_log_prob"] < 0 for p in whole["segments"])
    assert len(other["segments"]) == 1

    assert model.transcribe([short, long_file], max_audio_s=2.0, max_new_tokens=8) == [other["text"], whole["text"]]


def test_a_beam_search_tells_what_else_may_have_been_said(world, predict):
    path = world.utterances[0][0]
    _, line, _ = predict("--beam=4", "--file_path", path)
    status, out, _ = predict("--beam=4", "--format=json", "--file_path", path)
    assert status == 0
    (segment,) = json.loads(out)["segments"]
    texts = [segment["text"], *(reading["text"] for reading in segment["alternatives"])]
    assert texts[0] == json.loads(out)["text"]
    assert " ".join(texts[0].split()) + "\n" == line
    assert 1 < len(texts) == len(set(texts)) <= 4
    scores = [reading["average_log_prob"] for reading in (segment, *segment["alternatives"])]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] < 0


def test_states_alone_are_taken_beside_an_adapter(world, flags, predict, tmp_path):
    """The mission's own states, and those of no training."""
    path = next(flag for flag in flags if flag.startswith("--adapter=")).partition("=")[2]
    states = {name.removeprefix("language_model."): x for name, x in torch.load(path).items() if "time_state" in name}
    torch.save(states, tmp_path / "own.pth")
    torch.save({name: torch.zeros_like(x) for name, x in states.items()}, tmp_path / "zero.pth")
    audio = ("--file_path", *(path for path, _ in world.utterances[:3]))
    mission, own, zero = (predict(*more, *audio) for more in (
        [], [f"--load_state={tmp_path / 'own.pth'}"], [f"--load_state={tmp_path / 'zero.pth'}"]
    ))  # fmt: skip
    assert mission[:2] == own[:2]
    assert zero[0] == 0
    assert zero[1] != own[1]
    status, _, err = predict(f"--adapter={tmp_path / 'own.pth'}", *audio)
    assert status == 2
    assert "initial states without an adapter; name it by --load_state" in err


def test_subtitles_of_one_file_go_to_standard_output(predict, long_file):
    status, out, _ = predict("--max_audio_s=2", "--format=vtt", "--file_path", long_file)
    assert status == 0
    assert out.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:0")


@pytest.mark.parametrize("seconds", [0.5, 5, 40])
def test_silence_is_an_empty_line_at_any_length(predict, tmp_path, caplog, seconds):
    caplog.set_level("INFO", "rwkv_speech")
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros(int(16_000 * seconds)), 16_000)
    status, out, _ = predict("--file_path", path)
    assert (status, out) == (0, "\n")
    assert f"{path}: no speech in it" in caplog.messages


def test_segments_without_text_are_counted(world, predict, long_file, monkeypatch, caplog):
    numbers = itertools.count()
    monkeypatch.setattr("rwkv_speech.model.SpeechRWKV.text", lambda *_: ["a", ""][next(numbers) % 2])
    _, line, _ = predict("--max_audio_s=2", "--format=json", "--file_path", long_file)
    segments = json.loads(line)["segments"]
    assert [segment["text"] for segment in segments[:4]] == ["a", "", "a", ""]
    said = f"{long_file}: {len(segments) // 2} of {len(segments)} segments gave no text"
    assert caplog.messages.count(said) == 1


def test_a_file_for_each_in_output_dir(world, predict, tmp_path, caplog):
    paths = [path for path, _ in world.utterances[:2]]
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"")
    folder = tmp_path / "new" / "subtitles"
    status, out, _ = predict("--format=srt", f"--output_dir={folder}", "--file_path", paths[0], bad, paths[1])
    assert (status, out) == (1, "")
    first, last = (record.message for record in caplog.records if record.levelname == "ERROR")
    assert "bad.wav: is empty" in first
    assert "1 of 3 files" in last
    assert sorted(file.name for file in folder.iterdir()) == [f"{path.stem}.srt" for path in paths]
    assert (folder / f"{paths[0].stem}.srt").read_text().startswith("1\n00:00:00,000 --> 00:00:0")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_output_that_is_not_finite_is_one_line_in_every_form(world, predict, tmp_path, precision):
    """Of weights that are spoilt, and of such as leave the range of fp16."""
    weights = torch.load(world.model, weights_only=True)
    weights["blocks.1.ffn.value.weight"][0] = math.nan if precision == "fp32" else 1e9
    torch.save(weights, tmp_path / "model.pth")
    flags = [f"--load_model={tmp_path / 'model.pth'}", f"--precision={precision}", "--beam=2"]
    path = world.utterances[0][0]
    for form in FORMATS:
        status, out, err = predict(*flags, f"--format={form}", "--file_path", path)
        assert (status, out) == (2, "")
        (line,) = [line for line in err.splitlines() if line.startswith("train.py: ")]
        assert (
            f"model.pth: blocks.1.ffn.value.weight holds NaN or infinite numbers in torch.float{precision[2:]}" in line
        )
        assert "Traceback" not in err
    manifest = world.folder / "train.jsonl"
    status, out, err = predict("--op=eval", *flags, f"--data={manifest}", f"--proj_dir={tmp_path}", "--num_workers=0")
    assert (status, out, "ffn.value.weight holds NaN or infinite numbers" in err) == (2, "", True)
    assert not (tmp_path / "eval/summary.json").exists()
    written = "".join(file.read_text() for file in (tmp_path / "eval").rglob("*.json*"))
    assert not re.search(r"\b(NaN|Infinity)\b", written)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format=srt", "--file_path", "{0}", "{1}"], ["--format srt", "2 files", "--output_dir"]),
        (["--output_dir={2}", "--file_path", "{0}", "{0}"], ["would both go to"]),
        (["--output_dir={0}", "--file_path", "{1}"], ["--output_dir", "Not a directory", "expected a folder"]),
        (["--max_audio_s=0.5", "--file_path", "{0}"], ["--max_audio_s 0.5", "at least 1"]),
        (["--max_audio_s=nan", "--file_path", "{0}"], ["--max_audio_s nan"]),
        (["--format=xml", "--file_path", "{0}"], ["--format", "xml", "srt"]),
        (["--op=eval", "--output_dir={2}"], ["--output_dir", "--op predict"]),
    ],
    ids=["subtitles-of-two", "one-name", "no-folder", "too-short", "nan", "format", "eval"],
)
def test_mistakes_are_told_before_any_work(world, predict, tmp_path, arguments, words):
    names = [*(path for path, _ in world.utterances[:2]), tmp_path / "x"]
    status, out, err = predict(*(argument.format(*names) for argument in arguments))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert not [word for word in words if word not in err], err
    assert not (tmp_path / "x").exists()
