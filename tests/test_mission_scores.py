"""Scores of translations, answers, labels and descriptions: against their libraries in six scripts, and by hand."""

import io
import json
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
import torch
from rich.console import Console
from torchmetrics.functional.text import squad

from rwkv_speech.missions import get_mission
from rwkv_speech.scoring import (
    AnswerScores,
    CaptionScores,
    EvalRecord,
    LabelScores,
    TranslationScores,
    bootstrap,
    score_table,
    summary,
    write_report,
)
from rwkv_speech.scoring import captions as caption_scores
from rwkv_speech.scoring import comet as comet_scores
from rwkv_speech.scoring import translations as translation_scores
from rwkv_speech.scoring.captions import cider_d, rouge_l
from rwkv_speech.scoring.translations import tokenizer_for

# Hypothesis, then its references: tokens separated by spaces, so that every library sees the same ones.
CAPTIONS = {
    "latin": [
        ("a dog barks at a car", "a dog barks at a passing car", "the dog is barking while a car drives by"),
        ("rain falls on a tin roof", "heavy rain falls on a metal roof", "rain drops hit a roof"),
        ("a man speaks and a man laughs", "a woman speaks and a crowd laughs", "people laugh at a woman who speaks"),
        ("birds", "birds sing in the morning", "many birds are singing"),
    ],
    "cyrillic": [
        ("собака лает на машину", "собака лает на проезжающую машину", "пёс лает пока едет машина"),
        ("дождь идёт по крыше", "сильный дождь стучит по крыше", "дождь барабанит по крыше"),
        ("птицы поют утром", "утром поют птицы", "много птиц поют в лесу"),
    ],
    "arabic": [
        ("كلب ينبح على سيارة", "كلب ينبح على سيارة عابرة", "ينبح الكلب بينما تمر سيارة"),
        ("المطر يسقط على السقف", "مطر غزير يسقط على السقف", "قطرات المطر تضرب السقف"),
    ],
    "devanagari": [
        ("कुत्ता गाड़ी पर भौंकता है", "एक कुत्ता गाड़ी पर भौंकता है", "गाड़ी देखकर कुत्ता भौंक रहा है"),
        ("छत पर बारिश हो रही है", "टीन की छत पर तेज़ बारिश हो रही है", "बारिश छत पर गिरती है"),
    ],
    "thai": [
        ("ห ม า เ ห ่ า", "ห ม า เ ห ่ า ร ถ", "ส ุ น ั ข เ ห ่ า"),
        ("ฝ น ต ก", "ฝ น ต ก ห น ั ก", "ฝ น ต ก บ น ห ล ั ง ค า"),
    ],
    "chinese": [
        ("狗 在 叫", "一 只 狗 在 叫", "狗 对 着 汽 车 叫"),
        ("雨 落 在 屋 顶 上", "大 雨 落 在 铁 皮 屋 顶 上", "屋 顶 上 有 雨 声"),
        ("鸟 叫", "鸟 儿 在 早 上 唱 歌", "很 多 鸟 在 叫"),
    ],
}  # fmt: skip
# By the authors' own code (pycocoevalcap 1.2): CIDEr-D and ROUGE-L of each.
COCO = {
    "latin": (
        [4.1116351495779915, 3.043000777446747, 1.4734995548798069, 1.0370789303813672],
        [0.9104477611940297, 0.7587064676616916, 0.7142857142857143, 0.3609467455621302],
    ),
    "cyrillic": (
        [2.5932717378119468, 2.536993314222232, 1.5553071057719263],
        [0.8714285714285713, 0.75, 0.3333333333333333],
    ),
    "arabic": ([4.650030596258231, 2.648426909126593], [0.8714285714285713, 0.6535714285714286]),
    "devanagari": ([4.880951497844895, 3.1958919406857493], [0.8944281524926685, 0.7721518987341772]),
    "thai": ([5.703859596316057, 3.6828511456274224], [0.8557114228456915, 0.6288659793814433]),
    "chinese": (
        [2.62496665501391, 3.617480216119264, 1.0296197528593618],
        [0.7176470588235294, 0.7721518987341772, 0.5304347826086957],
    ),
}


def record(hypothesis, *references, id="a", **more):
    answers = {"answers": list(references)} if len(references) > 1 else {}
    details = answers | more.pop("details", {})
    return EvalRecord(id=id, reference=references[0], hypothesis=hypothesis, seconds=1.0, details=details, **more)


def values(scores):
    return {metric.kind.name: metric.value for metric in scores.metrics}


# --- translate -----------------------------------------------------------------------------------------------------

# Target language, sacrebleu's tokeniser, and hypotheses with their references.
TRANSLATIONS = {
    "de": ("13a", [("Das Wetter ist heute sehr gut.", "Das Wetter ist heute gut."),
                   ("Ich habe den Bus verpasst!", "Ich habe den Zug leider verpasst!")]),
    "ru": ("13a", [("Сегодня очень хорошая погода.", "Сегодня хорошая погода, правда."),
                   ("Я опоздал на поезд", "Я опоздал на поезд")]),
    "ar": ("13a", [("الطقس جميل جدا اليوم في المدينة.", "الطقس جميل اليوم في المدينة."),
                   ("فاتني القطار", "لقد فاتني القطار")]),
    "hi": ("13a", [("आज मौसम बहुत अच्छा है।", "आज का मौसम बहुत अच्छा है।"), ("मेरी ट्रेन छूट गई", "मेरी ट्रेन छूट गयी")]),
    "th": ("char", [("วันนี้อากาศดีมาก", "วันนี้อากาศดี"), ("ฉันพลาดรถไฟ", "ฉันตกรถไฟ")]),
    "zh": ("zh", [("今天天气很好。", "今天的天气非常好。"), ("我错过了火车 IC 10", "我没赶上 IC 10 火车")]),
}  # fmt: skip


def translations(language, several=False):
    _, pairs = TRANSLATIONS[language]
    return [
        record(hypothesis, reference, *([hypothesis + "?"] if several else []), id=f"{language}{i}",
               details={"target_language": language})
        for i, (hypothesis, reference) in enumerate(pairs)
    ]  # fmt: skip


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("several", [False, True], ids=["one-reference", "two-references"])
def test_translations_equal_sacrebleu(language, several):
    tokenizer, pairs = TRANSLATIONS[language]
    scores = TranslationScores(translations(language, several))
    hypotheses = [hypothesis for hypothesis, _ in pairs]
    references = [[reference for _, reference in pairs], *([[h + "?" for h in hypotheses]] if several else [])]
    bleu = sacrebleu.BLEU(tokenize=tokenizer)
    chrf = sacrebleu.CHRF(word_order=2)
    assert values(scores) == {
        "bleu": bleu.corpus_score(hypotheses, references).score,
        "chrf++": chrf.corpus_score(hypotheses, references).score,
    }
    assert scores.signatures == {"BLEU": str(bleu.get_signature()), "chrF++": str(chrf.get_signature())}
    assert f"tok:{tokenizer}" in scores.signatures["BLEU"]


def test_bleu_and_chrf_by_hand():
    scores = TranslationScores([record("a b c d e", "a b c d f", id="1"), record("g h i j", "g h i j", id="2")])
    # n-grams that match, of those there are: 8 of 9, 6 of 7, 4 of 5, 2 of 3; both corpora have 9 words.
    assert scores.leading.value == pytest.approx(100 * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25)
    # chrF++ without its spaces: characters 8/9, 6/7, 4/5, 2/3, 0/1 (and no 6-grams), words 8/9, 6/7; mean, beta 2.
    f = [8 / 9, 6 / 7, 4 / 5, 2 / 3, 0, 8 / 9, 6 / 7]
    assert values(scores)["chrf++"] == pytest.approx(100 * sum(f) / len(f), abs=1e-6)
    # A corpus of two draws: the first twice, the second twice (a quarter of the time each), or both.
    worst = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert scores.leading.interval == pytest.approx((worst, 100.0))


def test_intervals_of_bleu_are_those_of_sacrebleus_own_resampling():
    chance = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "sleeps"]
    pairs = []
    for _ in range(60):
        reference = [chance.choice(words) for _ in range(chance.randint(6, 20))]
        pairs.append((" ".join(chance.choice(words) if chance.random() < 0.2 else w for w in reference), reference))
    hypotheses, references = [h for h, _ in pairs], [" ".join(r) for _, r in pairs]
    scores = TranslationScores(
        [record(h, r, id=f"{i:02}") for i, (h, r) in enumerate(zip(hypotheses, references, strict=True))]
    )
    for metric, library in zip(scores.metrics, (sacrebleu.BLEU(), sacrebleu.CHRF(word_order=2)), strict=True):
        other = library.corpus_score(hypotheses, [references], n_bootstrap=2000)
        low, high = metric.interval
        assert (low + high) / 2 == pytest.approx(other._mean, abs=0.5)
        assert (high - low) / 2 == pytest.approx(other._ci, rel=0.1)


def test_several_target_languages_have_a_line_each_and_a_mean(tmp_path):
    records = [r for language in ("de", "zh") for r in translations(language)]
    scores = TranslationScores(records)
    each = {language: TranslationScores(translations(language)) for language in ("de", "zh")}
    assert [line["<Into"] for line in scores.rows()] == ["all", "de", "zh", "mean of 2"]
    document = json.loads(json.dumps(summary({"x": get_mission("translate").result(records)}), allow_nan=False))
    split = document["splits"]["x"]
    for language, alone in each.items():
        assert [m["value"] for m in split["target_languages"][language]] == [m.value for m in alone.metrics]
    bleu = [alone.leading.value for alone in each.values()]
    assert split["mean_of_languages"][0]["value"] == pytest.approx(sum(bleu) / 2)
    assert min(bleu) < scores.leading.value < max(bleu)
    assert "tok:13a" in split["signatures"]["BLEU"]
    assert "tok:zh" in split["signatures"]["BLEU"]
    write_report(tmp_path / "report.html", {"x": get_mission("translate").result(records)})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert split["signatures"]["chrF++"] in page
    assert "我没赶上 IC 10 火车" in page


def test_a_tokeniser_without_its_package_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(translation_scores, "find_spec", lambda name: None)
    tokenizer_for.cache_clear()
    assert [tokenizer_for(x) for x in ("ja", "ja", "ko_kr", "zh-TW", "cmn", "lo", "de", None)] == [
        "char", "char", "char", "zh", "zh", "char", "13a", "13a",
    ]  # fmt: skip
    assert tokenizer_for(None, "今天天气很好") == "char"
    (ja, ko) = caplog.messages
    assert "sacrebleu[ja]" in ja
    assert "sacrebleu[ko]" in ko
    monkeypatch.setattr(translation_scores, "find_spec", lambda name: name)
    tokenizer_for.cache_clear()
    assert [tokenizer_for(x) for x in ("ja", "ko")] == ["ja-mecab", "ko-mecab"]
    tokenizer_for.cache_clear()


FAKE_COMET = """#!{python}
import json, sys
names = ("--sources", "--translations", "--references")
src, mt, ref = (open(sys.argv[sys.argv.index(name) + 1], encoding="utf-8").read().splitlines() for name in names)
if "fail" in mt:
    sys.exit("no model\\nno such model")
lines = [{{"src": s, "mt": m, "ref": r, "COMET": (m == r) - 0.25 * (s == "hi there")}} for s, m, r in zip(src, mt, ref)]
json.dump({{"x": lines}}, open(sys.argv[sys.argv.index("--to_json") + 1], "w"))
"""


def test_comet_is_the_commands_where_it_is_there(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "rwkv_speech")
    comet_scores._left_out.cache_clear()
    details = {"transcript": "hi\nthere"}
    records = [record("hallo", "hallo", id="1", details=details), record("a", "b", id="2", details=details)]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "comet" not in values(TranslationScores(records))
    program = tmp_path / "comet-score"
    program.write_text(FAKE_COMET.format(python=sys.executable))
    program.chmod(0o755)
    assert values(TranslationScores(records))["comet"] == (0.75 - 0.25) / 2
    assert "comet" not in values(TranslationScores([*records, record("a", "b", id="3")]))
    assert "comet" not in values(TranslationScores([record("fail", "b", details=details)]))
    assert [line.removeprefix("COMET is left out: ") for line in caplog.messages] == [
        "it needs the command comet-score: pipx install unbabel-comet",
        "it compares with what was said, and some rows have no 'transcript'",
        "comet-score ended with status 1 and says no such model",
    ]


# --- answer --------------------------------------------------------------------------------------------------------

ANSWERS = {
    "latin": [("The Eiffel Tower, in Paris!", "eiffel tower"), ("Paris", "paris."), ("No idea", "London")],
    "cyrillic": [("Это город Москва.", "Москва"), ("Пётр Великий", "Пётр Первый"), ("нет", "нет")],
    "arabic": [("مدينة القاهرة", "القاهرة"), ("القاهرة", "القاهرة"), ("لا أعرف", "دمشق")],
    "devanagari": [("नई दिल्ली शहर", "नई दिल्ली"), ("मुंबई", "मुंबई"), ("पता नहीं", "जयपुर")],
    "greek": [("η Αθήνα", "Αθήνα"), ("ΑΘΉΝΑ", "αθήνα"), ("ναι", "όχι")],
    "hangul": [("서울 특별시", "서울"), ("부산", "부산"), ("몰라요", "대구")],
}


@pytest.mark.parametrize("script", ANSWERS)
def test_answers_equal_torchmetrics_squad(script):
    pairs = ANSWERS[script]
    scores = AnswerScores([record(h, r, r + " x", id=str(i)) for i, (h, r) in enumerate(pairs)])
    predictions = [{"prediction_text": h, "id": str(i)} for i, (h, _) in enumerate(pairs)]
    targets = [
        {"answers": {"text": [r, r + " x"], "answer_start": [0, 0]}, "id": str(i)} for i, (_, r) in enumerate(pairs)
    ]
    other = squad(predictions, targets)
    found = values(scores)
    assert 100 * found["exact_match"] == pytest.approx(float(other["exact_match"]))
    assert 100 * found["token_f1"] == pytest.approx(float(other["f1"]), rel=1e-5)


def test_answers_by_hand():
    scores = AnswerScores([
        record("It's the city of Paris.", "Paris", "paris, france", id="1"),  # its city of paris: F1 2 * 1/4 * 1/1 ...
        record("42", "forty-two", "42", id="2"),
        record("14", "4", id="3"),  # contains the character, not the token
        record("是巴黎。", "巴黎", id="4"),  # characters are tokens: 2 of 3
        record("", "no", id="5"),
    ])  # fmt: skip
    f1 = [2 * 1 / (4 + 1), 1.0, 0.0, 2 * 2 / (3 + 2), 0.0]
    assert values(scores) == {"exact_match": 1 / 5, "token_f1": pytest.approx(sum(f1) / 5), "contained": 3 / 5}
    low, high = scores.leading.interval
    assert low == 0 < 1 / 5 < high <= 0.6


# --- label ---------------------------------------------------------------------------------------------------------


def labels():
    chance = random.Random(1)
    names = ["dog", "猫", "курица", "بقرة", "घोड़ा", "เป็ด", "rare"]
    pairs = [(chance.choice(names[:-1]), chance.choice(names)) for _ in range(80)]
    return [(a, a if chance.random() < 0.6 else b) for a, b in pairs] + [("rare", "dog")]


def test_labels_equal_scikit_learn():
    pairs = labels()
    scores = LabelScores([record(h, r, id=f"{i:03}") for i, (r, h) in enumerate(pairs)])
    truth, chosen = zip(*pairs, strict=True)
    assert values(scores) == {
        "accuracy": sklearn.metrics.accuracy_score(truth, chosen),
        "macro_f1": pytest.approx(sklearn.metrics.f1_score(truth, chosen, average="macro")),
    }
    assert scores.summary()["confusion"] == sklearn.metrics.confusion_matrix(truth, chosen).tolist()
    rng = np.random.default_rng(0)
    again = []
    for _ in range(2000):
        drawn = rng.integers(len(pairs), size=len(pairs))
        a, b = np.array(truth)[drawn], np.array(chosen)[drawn]
        places = {name: i for i, name in enumerate(scores.labels)}
        counts = np.zeros((len(places), len(places)))
        np.add.at(counts, ([places[x] for x in a], [places[x] for x in b]), 1)
        both = counts.sum(0) + counts.sum(1)
        again.append((2 * counts.diagonal()[both > 0] / both[both > 0]).mean())
    assert scores.metrics[1].interval == pytest.approx(tuple(np.percentile(again, (2.5, 97.5))), abs=0.01)


def test_labels_by_hand(tmp_path):
    records = [
        record("dog", "dog", id="1", probability=0.9),
        record("Dog", "dog", id="2", probability=0.7),
        record("dog", "<cat>", id="3", probability=0.5),
        record("<cat>", "<cat>", id="4", probability=0.9),
        record("cow", "dog", id="5", probability=0.4),
    ]
    scores = LabelScores(records)
    # F1: dog 2 * 2 / (3 + 3), cat 2 * 1 / (2 + 1), cow 0
    assert values(scores) == {"accuracy": 3 / 5, "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 0) / 3)}
    assert scores.headline == "Accuracy 60.00 %, Macro-F1 44.44 %"
    found = scores.summary()
    assert found["labels"] == ["<cat>", "cow", "dog"]
    assert found["confusion"] == [[1, 0, 1], [0, 0, 0], [0, 1, 2]]
    assert found["mean_probability"] == pytest.approx(0.68)
    write_report(tmp_path / "report.html", {"zoo": get_mission("label").result(records)})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    (picture,) = [part.partition("</svg>")[0] for part in page.split("<svg")[1:]]
    assert "&lt;cat&gt; taken for dog 1 times" in picture
    assert picture.count("var(--sub)") == 2  # two kinds of confusion, and two labels that were right
    assert picture.count("var(--del)") == 2
    assert "2 of 2 wrong answers" in page
    assert "<td>0.40</td>" in page


def test_a_picture_of_many_labels_shows_those_that_are_confused(tmp_path):
    records = [record(f"label {i}" if i != 70 else "label 71", f"label {i}", id=f"{i:03}") for i in range(100)]
    write_report(tmp_path / "report.html", {"x": get_mission("label").result(records)})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the 30 of 100 with most errors" in page
    assert "label 70 taken for label 71 1 times" in page


# --- describe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", CAPTIONS)
def test_descriptions_equal_the_authors_code(script):
    tokens = [[text.split() for text in texts] for texts in CAPTIONS[script]]
    cider, rouge = COCO[script]
    assert cider_d([x[0] for x in tokens], [x[1:] for x in tokens]) == pytest.approx(cider, rel=1e-12)
    assert [rouge_l(x[0], x[1:]) for x in tokens] == pytest.approx(rouge, rel=1e-12)
    # Joined again, texts are tokenised to the same tokens, and the mean is over utterances.
    joint = "" if script in ("thai", "chinese") else " "
    texts = [[joint.join(part).capitalize() + "!" for part in x] for x in tokens]
    scores = CaptionScores([record(*x, id=str(i)) for i, x in enumerate(texts)])
    found = values(scores)
    assert found["cider_d"] == pytest.approx(sum(cider) / len(cider))
    assert found["rouge_l"] == pytest.approx(sum(rouge) / len(rouge))
    other = sacrebleu.CHRF().corpus_score([x[0] for x in texts], list(zip(*(x[1:] for x in texts), strict=True)))
    assert found["chrf"] == other.score


def test_descriptions_by_hand():
    tokens = [(["dog", "barks"], [["dog", "barks"]]), (["rain"], [["wind", "blows"]])]
    # The first is its reference, but has no n-grams of 3 and 4: two cosines of 1 of four. The second shares nothing.
    assert cider_d(*zip(*tokens, strict=True)) == pytest.approx([10 * 2 / 4, 0])
    # "a c" of "a b c" in order: precision 2/2, recall 2/3 of the reference; F with beta 1.2
    assert rouge_l("ac", ["abc"]) == pytest.approx(2.44 * 1 * (2 / 3) / (2 / 3 + 1.44 * 1))
    assert (rouge_l("", ["abc"]), rouge_l("x", ["abc"])) == (0, 0)
    chrf = values(CaptionScores([record("ab", "ab", id="1"), record("x", "yz", id="2")]))["chrf"]
    # characters: 2 of 3 (of 4 in the references), pairs 1 of 1 (of 2); F of the mean precision and recall, beta 2
    precision, recall = (2 / 3 + 1) / 2, (2 / 4 + 1 / 2) / 2
    assert chrf == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


def test_scores_of_aac_metrics_stand_beside_where_it_works(monkeypatch, caplog):
    records = [record("a dog barks", "a dog barks", "the dog", id="1"), record("rain", "rain falls", id="2")]
    assert list(values(CaptionScores(records))) == ["cider_d", "rouge_l", "chrf"]  # it is not installed

    def spider(candidates, references):
        assert (candidates, references) == (["a dog barks", "rain"], [["a dog barks", "the dog"], ["rain falls"]])
        return {}, {"spider": torch.tensor([1.0, 2.0])}

    def fense(candidates, references):
        raise FileNotFoundError("no model\nwith many lines")

    monkeypatch.setattr(caption_scores, "find_spec", lambda name: name)
    monkeypatch.setitem(
        sys.modules, "aac_metrics", SimpleNamespace(functional=SimpleNamespace(spider=spider, fense=fense))
    )
    found = values(CaptionScores(records))
    assert found["spider"] == 1.5
    assert "fense" not in found
    assert "FENSE is left out: aac-metrics says no model" in caplog.messages


# --- of all --------------------------------------------------------------------------------------------------------


def test_resampled_corpora_without_a_score_are_left_out():
    statistics = np.array([[1.0, 0.0], [3.0, 4.0]])
    low, high = bootstrap(
        statistics, lambda sums: np.where(sums[:, 1] > 0, sums[:, 0] / np.maximum(1, sums[:, 1]), np.nan)
    )
    assert (low, high) == (3 / 4, 4 / 4)
    assert all(map(math.isnan, bootstrap(np.zeros((0, 2)), lambda sums: sums[:, 0])))


def test_tables_of_all_missions_fit_a_terminal():
    results = {}
    for name in ("transcribe", "translate", "answer", "label", "describe"):
        records = [
            record("a b c", "a b d", "a b", id=f"{i}", language=language, details={"target_language": language})
            for i, language in enumerate(("de", "en", "zh"))
        ]
        results[name] = get_mission(name).result(records)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(score_table(results))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
