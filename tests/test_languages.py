"""Transcripts in many languages: what is normalised, what is counted, what leads; by other libraries and by hand."""

import io
import json
import unicodedata

import jiwer
import pytest
from rich.console import Console
from whisper_normalizer.basic import BasicTextNormalizer

from rwkv_speech.data.sample import Row
from rwkv_speech.missions import get_mission
from rwkv_speech.scoring import (
    CER,
    MER,
    WER,
    EvalRecord,
    TextScores,
    TranscriptScores,
    leading_kind,
    normalise_basic,
    normalise_english,
    normalizer_for,
    score_table,
    spaced,
    summary,
    write_report,
)
from rwkv_speech.scoring.languages import units, without_needless_spaces


def record(reference, hypothesis, language=None, id="a"):
    return EvalRecord(id=id, reference=reference, hypothesis=hypothesis, seconds=1.0, language=language)


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("zh", "abc", False),
        ("zh-CN", "", False),
        ("cmn_hans_cn", "", False),
        ("Japanese", "", False),
        ("TH", "", False),
        *((code, "", False) for code in ("yue", "ja", "lo", "my_mm", "km")),
        *((code, "", True) for code in ("en", "ko_kr", "hi", "ar", "vi", "de-DE")),
        ("en", "今天天气很好", True),
        (None, "今天天气很好", False),
        (None, "วันนี้อากาศดี", False),
        (None, "오늘 날씨가 좋다", True),
        (None, "आज मौसम अच्छा है", True),
        (None, "我 very like 你", True),
        (None, "我非常 like 你", False),
        (None, "ສະບາຍດີ", False),
        (None, "မင်္ဂလာပါ", False),
        (None, "សួស្តី", False),
        (None, "ሰላም ለዓለም", True),
        (None, "", True),
        ("", "スーパーへ行く", False),
    ],
)
def test_whether_words_are_spaced(language, text, expected):
    assert spaced(language, text) == expected


def test_units_by_hand():
    assert units("我們 go 到 café，3.5 ｱ") == [*"我們", "go", "到", "café，3.5", "ｱ"]
    assert units("ที่ ok") == ["ท", "ี", "่", "ok"]
    assert without_needless_spaces("我 們 go home 到 家") == "我們go home到家"


# What no mark remains in after NFKC: there Whisper's own basic normaliser is the other library.
TEXTS = {
    "latin": "Él dijo: “¿Qué (risas) pasó, señor?” [ruido] — ½ kg à 3,50 €",
    "cyrillic": "Съешь ЕЩЁ этих мягких французских булок, да выпей же чаю!",
    "greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "chinese": "今天（星期五）天气很好，ＡＢＣ１２３。",
    "japanese": "ﾊﾟﾘは「花の都」です。",
    "hangul": "오늘 날씨가 좋다!",
    "arabic": "الطقس جميل اليوم، أليس كذلك؟",
}


@pytest.mark.parametrize("script", TEXTS)
def test_basic_normalisation_equals_whispers_where_no_marks_are(script):
    assert normalise_basic(TEXTS[script]) == " ".join(BasicTextNormalizer()(TEXTS[script]).split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("नमस्ते, दुनिया!", "नमस्ते दुनिया"),
        ("สวัสดีครับ!", "สวัสดีครับ"),
        ("مُحَمَّدٌ؟", "مُحَمَّدٌ"),
        ("ﬁn Ａ１ ｶﾞ", "fin a1 ガ"),
    ],
    ids=["hindi", "thai", "arabic-vowels", "width"],
)
def test_marks_that_carry_meaning_are_kept_and_widths_folded(text, expected):
    assert normalise_basic(text) == unicodedata.normalize("NFKC", expected)


def test_each_text_is_normalised_by_its_language():
    assert [normalizer_for(*x) for x in (("en-US", "é"), ("de", "a"), (None, "naïve"), (None, "й a"), (None, ""))] == [
        "english", "basic", "english", "basic", "english",
    ]  # fmt: skip
    scores = TranscriptScores([record("Twenty-one!", "21", "en", "1"), record("Über.", "über", "de", "2")])
    assert scores.normalised.words.rate == 0
    assert normalise_english("Über") == "uber"


def test_cer_leads_in_chinese_and_spaces_count_nothing():
    # 1 of 6 characters is wrong, 2 are added to 3; of 2 words and 1 all are wrong, and 1 is added
    records = [record("今天 天气很好", "今天天汽很好", "zh", "1"), record("我爱你", "我 很爱你们", "zh", "2")]
    scores = get_mission("transcribe").score(records)
    assert scores.leading.kind == CER
    assert scores.leading.value == 3 / 9 == jiwer.cer(["今天天气很好", "我爱你"], ["今天天汽很好", "我很爱你们"])
    assert scores.leading.interval == pytest.approx((1 / 6, 2 / 3))
    found = {metric.kind.name: metric for metric in scores.metrics}
    assert list(found) == ["cer", "cer_normalised", "wer", "ser"]
    assert found["wer"].value == jiwer.wer([r.reference for r in records], [r.hypothesis for r in records])
    assert all(metric.interval for metric in found.values())
    assert found["ser"].value == 1.0
    assert scores.headline == "CER 33.33%, WER 133.33%, mean of utterances 41.67%"


def test_mixed_script_counts_characters_and_other_words():
    # units: 我 想 要 coffee 和 tea: coffee is another word, and 和 is lost: 2 of 6
    texts = TextScores([record("我想要 coffee 和 tea", "我想要 coffey tea", "zh")])
    assert texts.kinds == [WER, CER, MER]
    assert texts.edits(MER).rate == 2 / 6
    assert texts.interval_of(MER) == (2 / 6, 2 / 6)
    scores = TranscriptScores(texts.records)
    assert [metric.kind.name for metric in scores.metrics] == ["cer", "cer_normalised", "wer", "mer", "ser"]
    assert "mer" not in {metric.kind.name for metric in TranscriptScores([record("我想要。", "", "zh")]).metrics}


def test_what_leads_is_the_same_for_rows_and_records():
    texts = {WER: [("de", "a b")], CER: [("ja", "あ"), (None, "今天")], MER: [("en", "a"), ("th", "กา")]}
    for kind, pairs in texts.items():
        rows = [Row(str(i), text, None, language=language) for i, (language, text) in enumerate(pairs)]
        records = [record(text, text, language, str(i)) for i, (language, text) in enumerate(pairs)]
        mission = get_mission("transcribe")
        assert leading_kind(pairs) == mission.leading_of(rows) == mission.score(records).leading.kind == kind
    assert leading_kind([]) == WER


@pytest.fixture
def three_languages():
    return [
        record("guten tag", "guten tat", "de", "1"),  # WER 1/2, CER 1/9
        record("good day sir", "good day sir", "en", "2"),  # 0
        record("good", "", "en", "3"),  # 1 of 1: English 1/4, CER 4/16
        record("今天很好", "今天好", "zh", "4"),  # WER 1/1, CER 1/4
    ]


def test_each_language_has_a_row_and_so_has_their_mean(three_languages, tmp_path):
    result = get_mission("transcribe").result(three_languages)
    scores = result.scores
    assert scores.leading.kind == MER
    assert scores.leading.value == (1 + 1 + 1) / (2 + 4 + 4)
    lines = {line["<Text"]: line for line in scores.rows()}
    assert list(lines) == ["raw", "normalised", "de", "en", "zh", "mean of 3"]
    figures = {name: (line["*MER"], line["WER"], line["CER"]) for name, line in lines.items()}
    assert figures["de"] == ("50.00", "50.00", "11.11")
    assert figures["en"] == ("25.00", "25.00", "25.00")
    assert figures["zh"] == ("25.00", "100.00", "25.00")
    assert figures["mean of 3"] == ("33.33", "58.33", "20.37")
    document = json.loads(json.dumps(summary({"x": result}), allow_nan=False))["splits"]["x"]
    assert {name: found["wer"] for name, found in document["languages"].items()} == {"de": 0.5, "en": 0.25, "zh": 1.0}
    assert [metric["name"] for metric in document["mean_of_languages"]] == ["mer", "wer", "cer"]
    mean = document["mean_of_languages"][0]
    assert mean["value"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert mean["interval"][0] < mean["value"] < mean["interval"][1]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(score_table({"x": result, "plain": get_mission("transcribe").result(three_languages[:1])}))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert text.count("WER") == 1  # it leads in one split, and stands in the same column for both
    write_report(tmp_path / "report.html", {"x": result})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "MER <strong>30.00 %</strong> over 10 units" in page
    assert "<td>58.33</td>" in page
