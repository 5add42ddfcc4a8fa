"""Missions: the registry, `transcribe` by hand-worked values, and a mission made up here, scored beside it."""

import io
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rwkv_speech.data.sample import Message, Row, SampleError
from rwkv_speech.errors import UserError
from rwkv_speech.mission_file import best_mission_file
from rwkv_speech.missions import MISSIONS, get_mission
from rwkv_speech.missions.mission import Mission
from rwkv_speech.ops import OPS
from rwkv_speech.options import Options
from rwkv_speech.scoring import (
    EvalRecord,
    LabelScores,
    MetricKind,
    TranscriptScores,
    read_records,
    score_table,
    summary,
    write_report,
)
from rwkv_speech.scoring.labels import ACCURACY
from rwkv_speech.speech.audio import load_audio
from rwkv_speech.speech.recording import Recording
from tests.tiny import do, missions

ROW = Row("r1", "guten tag", Recording(Path("a.wav")), speaker="ann", language="de")


class Animal(Mission):
    """Names the animal in the recording."""

    name = "animal"
    leading = ACCURACY
    chooses = True

    def score(self, records):
        return LabelScores(records)

    def sample(self, row):
        if row.text == "":
            raise SampleError("no 'text': the name of the animal")
        return super().sample(row)

    def max_new_tokens(self, seconds):
        return 8


def records(*pairs, **more):
    return [
        EvalRecord(id=f"u{i}", reference=reference, hypothesis=hypothesis, seconds=2.0, **more)
        for i, (reference, hypothesis) in enumerate(pairs)
    ]


# 1 of 3 and 1 of 2 words wrong; 2 of 13 + 1 of 5 characters ("tag" -> "tat" is 1, "der" -> "die" 2)
SPOKEN = records(("Der Hund bellt", "die hund bellt"), ("guten Tag", "guten tat"))
# three of four right, one of them but for its capital
ANIMALS = records(("dog", "dog"), ("cat", "Cat"), ("<cow>", "dog & cat"), ("hen", "hen"))


def test_the_registry_knows_each_mission_by_its_name():
    assert "transcribe" in MISSIONS
    assert all(get_mission(name).name == name for name in MISSIONS)
    with pytest.raises(UserError, match=r"no mission 'sing'; expected one of: .*\btranscribe\b") as error:
        get_mission("sing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mission", [*MISSIONS.values(), Animal()], ids=lambda mission: mission.name)
def test_a_mission_is_best_by_the_metric_that_leads_its_scores(mission):
    pairs = [("a b c d e", "a b c d e"), ("a b c d e", "a b c d x"), ("b", "b")]
    scores = mission.score(records(*pairs))
    assert scores.leading.kind == mission.leading
    assert scores.metrics[0] is scores.leading
    perfect = mission.score(records(*[(reference, reference) for reference, _ in pairs])).leading.value
    assert mission.leading.better(perfect, scores.leading.value)
    assert not mission.leading.better(scores.leading.value, perfect)
    assert math.isnan(mission.score([]).leading.value)  # before the first answer is there


def test_better_goes_by_the_kind_and_nan_is_worst():
    wer = MetricKind("wer", "WER", higher_is_better=False)
    bleu = MetricKind("bleu", "BLEU", higher_is_better=True, percent=False)
    assert [kind.better(1.0, 2.0) for kind in (wer, bleu)] == [True, False]
    assert [kind.better(2.0, 1.0) for kind in (wer, bleu)] == [False, True]
    for kind in (wer, bleu):
        assert kind.better(1.0, math.nan)
        assert not any((kind.better(1.0, 1.0), kind.better(math.nan, 1.0), kind.better(math.nan, math.nan)))
    assert (wer.text(0.0813), wer.text(0.0813, 1), bleu.text(31.416)) == ("8.13 %", "8.1 %", "31.42")


def test_a_row_becomes_a_sample_of_one_round():
    sample = get_mission("transcribe").sample(ROW)
    assert sample.id == "r1"
    assert sample.messages == (Message("user", (ROW.audio,)), Message("assistant", ("guten tag",)))
    assert not get_mission("transcribe").chooses


@pytest.mark.parametrize(
    ("seconds", "tokens"), [(0.0, 100), (2.0, 100), (2.01, 101), (10.0, 500), (35.0, 1750)], ids=str
)
def test_transcripts_get_50_tokens_a_second_and_at_least_100(seconds, tokens):
    assert get_mission("transcribe").max_new_tokens(seconds) == tokens


def test_a_record_holds_what_the_row_and_the_decoder_tell(tmp_path):
    record = get_mission("transcribe").record(ROW, "guten tat", seconds=1.5, score=-0.25, loop=True, wall_seconds=0.1)
    expected = EvalRecord(
        id="r1", reference="guten tag", hypothesis="guten tat", seconds=1.5,
        speaker="ann", language="de", mission="transcribe", score=-0.25, loop=True, wall_seconds=0.1,
    )  # fmt: skip
    assert record == expected
    row = replace(ROW, answers=("Tag", "guten tag"), target_language="de", prompt="typed")
    record = get_mission("answer").record(row, "tag", seconds=1.0, probability=0.5)
    assert record.details == {"answers": ["Tag", "guten tag"], "target_language": "de"}
    assert record.references == ["guten tag", "Tag"]
    old = {"id": "r0", "reference": "a", "hypothesis": "b", "seconds": 1.0, "speaker": None, "score": -0.5}
    (tmp_path / "x.jsonl").write_bytes(json.dumps(old | {"loop": False, "wall_seconds": 2.0}).encode() + b"\n")
    with (tmp_path / "x.jsonl").open("ab") as file:
        file.write(record.line())
    before, after = read_records(tmp_path / "x.jsonl")  # the first as written before there were missions
    assert (before.id, before.score, before.language, before.details) == ("r0", -0.5, None, {})
    assert after == record


def test_transcribe_by_hand():
    result = get_mission("transcribe").result(SPOKEN, left_out=1)
    metrics = {metric.kind.name: metric for metric in result.scores.metrics}
    assert {name: metric.value for name, metric in metrics.items()} == {
        "wer": 2 / 5,
        "wer_normalised": 2 / 5,
        "cer": 3 / 23,
        "ser": 1.0,
    }
    # Drawn with replacement, the two utterances give 1/3, 2/5 or 1/2, each extreme a quarter of the time.
    assert metrics["wer"].interval == pytest.approx((1 / 3, 1 / 2))
    assert result.scores.headline == "WER 40.00%, mean of utterances 41.67%"
    assert (result.mission, result.cost.utterances, result.cost.left_out) == ("transcribe", 2, 1)
    with pytest.raises(UserError, match="'u0' occurs twice"):
        get_mission("transcribe").result([*SPOKEN, SPOKEN[0]])


def test_transcripts_without_spaces_are_led_by_their_characters():
    """1 of 4 and 0 of 3 characters are wrong; as words, the first utterance as a whole."""
    mission = get_mission("transcribe")
    pairs = records(("今天天气", "今天天汽"), ("你好吗", "你好吗"))
    scores = mission.score(pairs)
    assert (scores.leading.kind.name, scores.leading.value) == ("cer", pytest.approx(1 / 7))
    assert scores.headline.startswith("CER 14.29%, WER 50.00%")
    rows = [replace(ROW, text=text, language=None) for text in ("今天天气", "你好吗", "hello you")]
    assert mission.leading_of(rows[:2]).name == "cer"
    assert mission.leading_of(rows).name == "mer", "characters of some, words of the others"
    assert mission.leading_of([ROW, *rows[2:]]).name == "wer"


def test_a_running_score_computes_nothing_that_is_not_asked_for(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("not asked for")

    for name in ("jiwer.process_characters", "rwkv_speech.scoring.words.bootstrap_interval"):
        monkeypatch.setattr(name, fail)
    monkeypatch.setattr("rwkv_speech.scoring.normalise._english", fail)
    many = records(*[("one two three four five " * 4, "one two tree four five " * 4)] * 2600)
    start = time.process_time()
    assert get_mission("transcribe").score(many).leading.value == pytest.approx(1 / 5)
    assert time.process_time() - start < 2  # 0.07 s
    with pytest.raises(AssertionError, match="not asked for"):
        _ = get_mission("transcribe").score(many).metrics


def test_missions_and_scoring_come_without_heavy_imports():
    code = (
        "import sys; import rwkv_speech.data.sample; before = set(sys.modules); import rwkv_speech.missions; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "jiwer" in found
    assert not {"transformers", "matplotlib", "sklearn", "sacrebleu"} & set(found)


def test_a_new_mission_says_what_its_rows_lack_and_which_labels_there_are():
    with pytest.raises(ValueError, match="the name of the animal"):
        Animal().sample(replace(ROW, text=""))
    assert Animal().labels([replace(ROW, text=text) for text in ("dog", "cat", "dog")]) == ["cat", "dog"]
    assert (Animal().max_new_tokens(9.0), Animal().name in MISSIONS) == (8, False)


@pytest.fixture
def mixed():
    """Splits of two missions in one evaluation."""
    transcribe, animal = get_mission("transcribe"), Animal()
    assert isinstance(transcribe.score(SPOKEN), TranscriptScores)
    return {
        "speech": transcribe.result(SPOKEN, left_out=1),
        "zoo [1]": animal.result(ANIMALS, peak_memory=2**30),
        "more": transcribe.result(SPOKEN[:1]),
    }


def test_splits_of_two_missions_share_a_summary(mixed):
    document = json.loads(json.dumps(summary(mixed), allow_nan=False))
    assert list(document["splits"]) == list(mixed)
    speech, zoo = document["splits"]["speech"], document["splits"]["zoo [1]"]
    assert (speech["mission"], speech["raw"]["wer"], speech["left_out"]) == ("transcribe", 2 / 5, 1)
    assert speech["metrics"][0] == {"name": "wer", "value": 2 / 5, "interval": speech["raw"]["wer_interval"]}
    assert speech["metrics"][2] == {"name": "cer", "value": 3 / 23, "interval": speech["raw"]["cer_interval"]}
    assert speech["raw"]["cer_interval"] == pytest.approx([1 / 9, 2 / 14])  # one of the two utterances, twice
    assert zoo["mission"] == "animal"
    assert [metric["name"] for metric in zoo["metrics"]] == ["accuracy", "macro_f1"]
    assert zoo["metrics"][0]["value"] == 3 / 4
    assert (zoo["utterances"], zoo["audio_seconds"], zoo["speed"]["peak_memory_bytes"]) == (4, 8.0, 2**30)
    assert "raw" not in zoo


def test_splits_of_two_missions_share_a_terminal(mixed):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(score_table(mixed))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"^ Split +Text +WER .*\n speech +raw +40\.00 .*\n +normalised .*\n more ", "\n".join(lines))
    (heads,) = [number for number, line in enumerate(lines) if "Accuracy %" in line]
    assert re.fullmatch(r" zoo \[1\] +75\.00 \(\d+\.00–100\.00\) +\d+\.\d+ \(.*\) *", lines[heads + 1])
    assert [line.split()[0] for line in lines[-3:]] == ["speech", "zoo", "more"]  # and the cost of all


def test_splits_of_two_missions_share_a_report(mixed, tmp_path):
    write_report(tmp_path / "report.html", mixed)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>Error rates and Labels: speech · zoo [1] · more</title>" in page
    boards = page[: page.index("<section")]
    assert re.findall("<h3>(.*?)</h3>", boards) == ["Accuracy: transcribe", "Accuracy: animal", "Cost and health"]
    assert boards.count("<svg") == 1  # the kinds of word errors
    zoo = page[page.index('<h2 id="split-1">') : page.index('<h2 id="split-2">')]
    assert "<strong>Accuracy 75.00 %, Macro-F1 " in zoo
    assert "1 of 1 wrong answers" in zoo
    assert '<td class="text">&lt;cow&gt;</td><td class="text">dog &amp; cat</td>' in zoo
    assert "WER" not in zoo


def test_a_report_of_one_new_mission_knows_nothing_of_words(tmp_path):
    write_report(tmp_path / "report.html", {"zoo": Animal().result(ANIMALS)})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>Labels: zoo</title>" in page
    assert not re.search("WER|word error", page)


# --- through the program -------------------------------------------------------------------------------------------


def test_a_mission_is_trained_evaluated_and_used_by_its_name(world, tmp_path, monkeypatch, capsys):
    """A class and its line in the registry are all that it takes: here for training, evaluation and prediction."""
    monkeypatch.setitem(MISSIONS, Animal.name, Animal())
    animals = ("cat", "dog", "a hen")
    audio = [str(path) for path, _ in world.utterances[:12]]
    lines = [{"audio": path, "text": animals[i % 3], "id": f"u{i}"} for i, path in enumerate(audio)]
    manifest = tmp_path / "animals.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [f"--data={manifest}", "--mission=animal", "--epoch_count=1", "--valid_steps=2"]
    assert do("train", world, tmp_path, *flags, f"--valid_split={manifest}", "--early_stop=9") == 0
    info = max((info for _, info in missions(tmp_path).values()), key=lambda info: info["step"])
    assert (info["mission"], info["labels"]) == ("animal", sorted(animals))
    assert 0 <= info["accuracy"] <= 1
    assert "valid_accuracy" in (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")

    # From here on the mission file tells.
    assert do("eval", world, tmp_path, f"--data={manifest}") == 0
    found = read_records(tmp_path / "eval/all.jsonl")
    assert {record.hypothesis for record in found} <= set(animals), "an answer is always one of the set"
    right = sum(record.hypothesis == record.reference for record in found) / 12
    split = json.loads((tmp_path / "eval/summary.json").read_text())["splits"]["all"]
    assert split["mission"] == "animal"
    assert split["metrics"][0]["value"] == pytest.approx(right)
    assert f"Accuracy {right:.2%}".replace("%", " %") in capsys.readouterr().out
    assert "Accuracy" in (tmp_path / "eval/report.html").read_text()

    world_flags = [flag for flag in world.flags if not flag.startswith("--data")]
    flags = ["--op=predict", f"--proj_dir={tmp_path}", *world_flags, "--format=json", "--file_path", *audio]
    assert OPS["predict"](Options.parse(flags)) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [x["text"] for x in printed] == [record.hypothesis for record in found]
    model = world.speech_rwkv(adapter=best_mission_file(tmp_path)[0])
    losses = {x: model.loss([load_audio(audio[0])], [x]).item() for x in animals}
    assert printed[0]["text"] == min(losses, key=losses.get), "the likeliest answer, by the mean loss of each"


ROWS = {
    "transcribe": {"text": "Guten Tag", "language": "de"},
    "translate": {"text": "你好。", "language": "de", "target_language": "zh"},
    "answer": {"answers": ["Paris", "paris, france"], "prompt": "Where?"},
    "label": {"text": "a hen"},
    "describe": {"text": "A hen clucks.", "answers": ["A hen clucks.", "a clucking hen"]},
    "converse": {"text": "A hen."},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_mission_is_trained_evaluated_used_and_scored_again(name, world, tmp_path, capsys):
    """The rows of the training name the mission; from there on its file does, and the records."""
    rows = [ROWS[name] | {"audio": str(path), "id": f"u{i}"} for i, (path, _) in enumerate(world.utterances[:4])]
    if name == "label":
        rows[1] |= {"text": "dog"}
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row | {"mission": name}) + "\n" for row in rows))
    flags = [f"--data={manifest}", "--epoch_count=1", "--max_new_tokens=4"]
    assert do("train", world, tmp_path, *flags, f"--valid_split={manifest}") == 0
    (info,) = [info for _, info in missions(tmp_path).values()]
    assert info["mission"] == name
    assert info.get("labels") == (["a hen", "dog"] if name == "label" else None)
    leading = MISSIONS[name].leading.name
    assert leading in info
    assert f"valid_{leading}" in (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")

    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert do("eval", world, tmp_path, *flags) == 0
    printed = capsys.readouterr().out
    evaluated = json.loads((tmp_path / "eval/summary.json").read_text())["splits"]["all"]
    assert (evaluated["mission"], evaluated["metrics"][0]["name"], evaluated["utterances"]) == (name, leading, 4)
    assert all(len(metric["interval"]) == 2 for metric in evaluated["metrics"])
    found = read_records(tmp_path / "eval/all.jsonl")
    assert {record.mission for record in found} == {name}

    how = [f"--file_path={rows[0]['audio']}", "--format=json", *flags[2:], *world.flags[:2], *world.flags[3:]]
    how += ["--prompt=Where?"] if name == "answer" else []
    assert OPS["predict"](Options.parse(["--op=predict", f"--proj_dir={tmp_path}", *how])) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["text"] == found[0].hypothesis
    if name == "label":
        (segment,) = predicted["segments"]
        probabilities = [segment["probability"], *(x["probability"] for x in segment["alternatives"])]
        assert sum(probabilities) == pytest.approx(1)
        assert found[0].probability == pytest.approx(max(probabilities)) == segment["probability"]
    else:
        assert "probability" not in predicted["segments"][0]

    again = ["--op=score", f"--records={tmp_path / 'eval/all.jsonl'}", f"--output_dir={tmp_path / 'again'}"]
    assert OPS["score"](Options.parse(again)) == 0
    scored = json.loads((tmp_path / "again/summary.json").read_text())
    assert scored["splits"]["all"] | {"speed": {}} == evaluated | {"speed": {}}
    assert (tmp_path / "again/report.html").is_file()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == printed.splitlines()[-1]  # the scores in a line; and the table, but for its peak memory
    assert {*lines[:2]} <= {*printed.splitlines()}


def score_again(path, *flags):
    return OPS["score"](Options.parse(["--op=score", f"--records={path}", *flags]))


def test_records_are_normalised_as_asked(tmp_path, capsys):
    spoken = records(("It's The colour, Über-Hund!", "it is the color uber hund"), language="en")
    (tmp_path / "dev.jsonl").write_bytes(b"".join(record.line() for record in spoken))
    # As they are, all 4 words differ, and 2 are added; in lower case "the" is right. The English normaliser makes the
    # same 6 words of both, the basic one "it s the colour über hund", of which 3 are wrong.
    rates = {"language": 0, "english": 0, "basic": 3 / 6, "none": (4 + 2) / 4}
    for normalizer, rate in rates.items():
        flags = [] if normalizer == "language" else [f"--normalizer={normalizer}"]
        assert score_again(tmp_path / "dev.jsonl", *flags, f"--output_dir={tmp_path / normalizer}") == 0
        found = json.loads((tmp_path / normalizer / "summary.json").read_text())
        assert found["splits"]["dev"]["normalised"]["wer"] == pytest.approx(rate), normalizer
        assert found["splits"]["dev"]["raw"]["wer"] == 5 / 4
    assert "British spellings" not in found["texts"]["normalised"]
    assert "dev: WER 125.00%" in capsys.readouterr().out


def test_mistakes_about_records_and_labels_are_one_line(world, tmp_path):
    path = tmp_path / "dev.jsonl"
    path.write_bytes(b"".join(r.line() for r in records(("a", "a"), mission="label")))
    with pytest.raises(UserError, match="--normalizer basic: only transcripts"):
        score_again(path, "--normalizer=basic")
    assert score_again(path, "--mission=transcribe", "--normalizer=basic") == 0
    with path.open("ab") as file:
        file.write(replace(records(("a", "a"))[0], id="x", mission="answer").line())
    with pytest.raises(UserError, match="records of several missions, answer, label"):
        score_again(path)
    with pytest.raises(UserError, match="no such file"):
        score_again(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"--op score needs --records"):
        Options.parse(["--op=score"])
    with pytest.raises(UserError, match="--records goes with --op score, not eval"):
        Options.parse(["--op=eval", "--load_model=x", "--records=x"])
    with pytest.raises(UserError, match="expected names joined by commas, each once"):
        Options.parse(["--load_model=x", "--labels=a,,b"])
    with pytest.raises(
        UserError, match="--labels goes with one mission that chooses among them, such as label, not tra"
    ):
        do("train", world, tmp_path, "--labels=a,b")
    with pytest.raises(UserError, match=r"the data has the label '.*', which is not among --labels a,b"):
        do("train", world, tmp_path, "--mission=label", "--labels=a,b")
    with pytest.raises(UserError, match="the mission label chooses among labels: name them by --labels"):
        world.speech_rwkv(mission="label").transcribe([world.utterances[0][0]])
    with pytest.raises(UserError, match="there is no mission 'sing'"):
        score_again(path, "--mission=sing")


def test_a_typed_prompt_goes_before_the_audio(world):
    row = replace(ROW, prompt="Wo?")
    assert get_mission("answer").sample(row).messages[0] == Message("user", ("Wo?", ROW.audio))
    assert get_mission("answer").sample(ROW).messages[0] == Message("user", (ROW.audio,))
    assert get_mission("transcribe").sample(row).messages[0] == Message("user", (ROW.audio,))
    model = world.speech_rwkv(mission="answer")
    plain, prompted = (
        model.prepare(
            [
                get_mission("answer").sample(
                    replace(r, audio=world.utterances[0][1] and load_audio(world.utterances[0][0]))
                )
            ]
        )
        for r in (ROW, row)
    )
    assert prompted.ids[0, :3].tolist() == model.tokenizer.encode("Wo?")
    assert prompted.audio_slots[0] == 3
    assert prompted.labels.tolist() == plain.labels.tolist()  # nothing is learnt of the prompt
    assert (prompted.label_slots - plain.label_slots).unique().tolist() == [3]
