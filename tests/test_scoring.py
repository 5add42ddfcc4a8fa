"""Scores against jiwer used another way, a plain edit distance, hand-worked numbers and simulated corpora."""

import io
import json
import math
import random
import re
from html import unescape
from html.parser import HTMLParser

import jiwer
import numpy as np
import pytest
from rich.console import Console

from rwkv_speech.errors import UserError
from rwkv_speech.scoring import (
    Cost,
    Edits,
    EvalRecord,
    RecordWriter,
    SplitResult,
    TranscriptScores,
    align,
    bootstrap_interval,
    by_length,
    by_speaker,
    normalise,
    normalise_english,
    read_records,
    score_table,
    summary,
    worst,
    write_report,
)


def record(reference, hypothesis, *, id="a", seconds=1.0, **more):
    return EvalRecord(id=id, reference=reference, hypothesis=hypothesis, seconds=seconds, **more)


def score(records):
    return TranscriptScores(records)


def result(records, **more):
    return SplitResult("transcribe", TranscriptScores(records), Cost.of(records, **more))


def corpus(n=80, seed=0):
    """Random word salads with all kinds of error; some hypotheses and some references are empty."""
    chance = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "sleeps"]
    records = []
    for number in range(n):
        reference = [chance.choice(words) for _ in range(chance.randint(1, 25))]
        hypothesis = []
        for word in reference:
            kind = chance.random()
            hypothesis += [chance.choice(words)] * (kind < 0.15) + [word] * (kind > 0.25)
            hypothesis += [chance.choice(words)] * (chance.random() < 0.05)
        if number % 19 == 3:
            hypothesis = []
        if number % 23 == 5:
            reference = []
        records.append(
            record(
                " ".join(reference).upper(),
                " ".join(hypothesis),
                id=f"u{number:03d}",
                seconds=0.2 + 2 * len(reference),
                speaker=f"s{number % 5}" if number % 11 else None,
            )
        )
    return records


def edit_distance(reference, hypothesis):
    """Levenshtein's, row by row."""
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, 1):
        above, row = row, [i]
        for j, h in enumerate(hypothesis, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (r != h)))
    return row[-1]


HAND = [
    # "a" is added, cat -> bat, the second "the" is lost: 3 of 7 words, and no other alignment has 3
    record("The cat sat on the mat today", "a the bat sat on mat today", id="h1", seconds=2.5, speaker="ann"),
    # right but for its capitals: 0 of 3
    record("GOOD MORNING ALL", "good morning all", id="h2", seconds=1.0, speaker="bob"),
    # an empty hypothesis: 2 deletions of 2 words
    record("hello there", "", id="h3", seconds=1.5, speaker="ann"),
    # an empty reference: 1 insertion of 0 words
    record("", "uh", id="h4", seconds=0.5, speaker="bob", loop=True),
]


def test_hand_worked_rates():
    scores, cost = score(HAND), Cost.of(HAND, left_out=2)
    raw = scores.raw
    assert raw.words == Edits(hits=8, substitutions=1, deletions=3, insertions=2)
    assert raw.words.rate == 6 / 12
    assert raw.mean_utterance_rate == pytest.approx((3 / 7 + 0 / 3 + 2 / 2) / 3)  # h4 has no rate
    assert raw.sentence_error_rate == 3 / 4
    # 28 + 16 + 11 + 0 characters; h1 differs by the 2 of "a ", c -> b, the 4 of "the "; h3 by 11, h4 by 2.
    assert raw.characters.length == 55
    assert raw.characters.rate == (7 + 0 + 11 + 2) / 55
    assert (cost.utterances, cost.audio_seconds) == (4, 5.5)
    assert (cost.loops, cost.empty_outputs, cost.empty_references, cost.left_out) == (1, 1, 1, 2)
    # Whisper's normaliser drops "uh"; the rest stays as it is.
    assert scores.normalised.words == Edits(hits=8, substitutions=1, deletions=3, insertions=1)


def test_alignment_of_the_hand_worked_case():
    assert align(HAND[:1])[0].steps == [
        ("insert", [], ["a"]),
        ("equal", ["the"], ["the"]),
        ("substitute", ["cat"], ["bat"]),
        ("equal", ["sat", "on"], ["sat", "on"]),
        ("delete", ["the"], []),
        ("equal", ["mat", "today"], ["mat", "today"]),
    ]


@pytest.mark.parametrize("form", ["raw", "normalised"])
def test_counts_equal_jiwer_utterance_by_utterance(form):
    records = corpus()
    texts = getattr(score(records), form)
    clean = {"raw": str.lower, "normalised": normalise_english}[form]
    pairs = [(clean(r.reference), clean(r.hypothesis)) for r in records]
    for edits, process in ((texts.words, jiwer.process_words), (texts.characters, jiwer.process_characters)):
        single = [process(*pair) for pair in pairs]
        for kind in ("hits", "substitutions", "deletions", "insertions"):
            assert getattr(edits, kind) == sum(getattr(output, kind) for output in single), kind
    assert texts.words.rate == jiwer.wer(*map(list, zip(*pairs, strict=True)))
    assert texts.characters.rate == jiwer.cer(*map(list, zip(*pairs, strict=True)))
    rates = [jiwer.wer(*pair) for pair in pairs if pair[0]]
    assert texts.mean_utterance_rate == pytest.approx(np.mean(rates))


def test_errors_equal_a_plain_edit_distance():
    records = corpus(seed=1)
    words = [edit_distance(r.reference.lower().split(), r.hypothesis.split()) for r in records]
    letters = [edit_distance(r.reference.lower(), r.hypothesis) for r in records]
    raw = score(records).raw
    assert [utterance.edits.errors for utterance in raw.aligned] == words
    assert (raw.words.errors, raw.characters.errors) == (sum(words), sum(letters))


def test_order_of_records_changes_nothing():
    records = corpus()
    assert summary({"x": result(records)}) == summary({"x": result(records[::-1])})


def test_all_references_empty_has_no_rate():
    texts = score([record("", "well", id="a"), record(" ", "", id="b")]).raw
    assert texts.words == Edits(insertions=1)
    assert math.isnan(texts.words.rate)
    assert all(map(math.isnan, (*texts.interval, texts.mean_utterance_rate)))
    assert texts.sentence_error_rate == 1 / 2


@pytest.mark.parametrize(
    ("records", "message"),
    [([], "no utterances"), ([record("a", "a"), record("b", "b")], "'a' occurs twice")],
    ids=["none", "twice"],
)
def test_unscorable_splits_are_refused(records, message):
    with pytest.raises(UserError, match=message):
        Cost.of(records)


def test_bootstrap_interval_covers_the_truth_at_its_nominal_rate():
    chance = np.random.default_rng(1)
    corpora, utterances, inside = 300, 150, 0
    for seed in range(corpora):
        lengths = chance.integers(2, 30, utterances)
        difficulty = chance.beta(2, 18, utterances)  # its mean, 0.1, is the expected WER
        low, high = bootstrap_interval(chance.binomial(lengths, difficulty), lengths, resamples=1000, seed=seed)
        assert 0 < high - low < 0.06  # an interval that covers by being wide would be no use
        inside += low <= 0.1 <= high
    assert 0.91 <= inside / corpora <= 0.98


def test_interval_has_the_width_of_the_delta_method():
    """The ratio's standard error, linearised: sqrt(sum((e - rate n)^2)) / sum(n) (Cochran 1977, ch. 6)."""
    chance = np.random.default_rng(2)
    lengths = chance.integers(5, 25, 3000)
    errors = chance.binomial(lengths, 0.2)
    rate = errors.sum() / lengths.sum()
    half = 1.96 * np.sqrt(((errors - rate * lengths) ** 2).sum()) / lengths.sum()
    low, high = bootstrap_interval(errors, lengths)
    assert high - low == pytest.approx(2 * half, rel=0.06)
    assert (low, high) == bootstrap_interval(errors, lengths)


def test_interval_belongs_to_its_text():
    scores = score(corpus())
    assert scores.raw.interval[0] < scores.raw.words.rate < scores.raw.interval[1]
    alone = score([record("a b c d", "a b c")]).raw
    assert alone.interval == (0.25, 0.25)


@pytest.mark.parametrize("breakdown", [by_length, by_speaker])
def test_breakdowns_add_up_to_the_corpus(breakdown):
    scores, cost = score(corpus()), Cost.of(corpus())
    groups = breakdown(scores.raw.aligned)
    assert len(groups) > 3
    assert sum((group.edits for group in groups), Edits()) == scores.raw.words
    assert sum(group.utterances for group in groups) == cost.utterances
    assert math.fsum(group.audio_seconds for group in groups) == pytest.approx(cost.audio_seconds)


def test_breakdowns_of_the_hand_worked_case():
    aligned = score(HAND).raw.aligned
    assert [(g.name, g.utterances, g.edits.errors) for g in by_length(aligned)] == [
        ("0–2 s", 3, 3),
        ("2–5 s", 1, 3),
    ]
    assert [(g.name, g.edits.rate) for g in by_speaker(aligned)] == [("ann", 5 / 9), ("bob", 1 / 3)]


def test_length_ranges_hold_their_lower_edge():
    aligned = align([record("a", "a", id=str(s), seconds=s) for s in (0, 1.99, 2, 29.9, 30, 4000)])
    assert [(g.name, g.utterances) for g in by_length(aligned)] == [
        ("0–2 s", 2),
        ("2–5 s", 1),
        ("20–30 s", 1),
        ("30 s and more", 2),
    ]


def test_worst_come_by_errors_then_rate_and_never_faultless():
    assert [u.record.id for u in worst(score(HAND).raw.aligned)] == ["h1", "h3", "h4"]
    same = align([record("a b c", "a b x", id="long"), record("a", "x", id="short")])
    assert [u.record.id for u in worst(same, n=1)] == ["short"]


def test_speed_is_summed_over_utterances():
    timed = [record("a", "a", id=str(i), seconds=4.0, wall_seconds=0.5) for i in range(3)]
    cost = Cost.of(timed)
    assert cost.real_time_factor == 1.5 / 12
    assert cost.utterances_per_second == 2
    assert Cost.of([*timed, record("a", "a", id="untimed")]).real_time_factor is None


def test_spellings_are_taken_where_a_table_is_installed(tmp_path, monkeypatch):
    package = tmp_path / "whisper_normalizer"
    (package / "normalizers").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "normalizers" / "english.json").write_text('{"colour": "color"}')
    caches = (normalise._spellings, normalise._english)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        [cache.cache_clear() for cache in caches]
        assert normalise_english("Colour, uh, it's twenty-one!") == "color it is 21"
        assert "kept" not in normalise.normaliser_name()
        monkeypatch.setattr(normalise, "find_spec", lambda name: None)
        [cache.cache_clear() for cache in caches]
        assert normalise_english("Colour, uh, it's twenty-one!") == "colour it is 21"
        assert "British spellings kept" in normalise.normaliser_name()
    finally:
        [cache.cache_clear() for cache in caches]


def test_records_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "eval" / "dev.jsonl"
    records = [record("été  \u2028 naïve", '"quoted"\n', id=f"{i}", score=-0.5, loop=True) for i in range(3)]
    assert read_records(path) == []
    with RecordWriter(path) as writer:
        for one in records[:2]:
            writer.write(one)
            assert read_records(path)[-1] == one  # on disk before the next one is decoded
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert read_records(path) == records[:1]
    with RecordWriter(path) as writer:
        writer.write(records[1])
        writer.write(records[2])
    assert read_records(path) == records
    assert path.read_bytes().startswith(whole)


def test_a_tear_within_a_character_is_a_tear(tmp_path):
    path = tmp_path / "dev.jsonl"
    with RecordWriter(path) as writer:
        writer.write(record("a", "a"))
    path.write_bytes(path.read_bytes() + '{"id": "b", "reference": "é'.encode()[:-1])
    assert [r.id for r in read_records(path)] == ["a"]


def test_a_repeated_record_counts_once(tmp_path, caplog):
    path = tmp_path / "dev.jsonl"
    with RecordWriter(path) as writer:
        writer.write(record("a", "first"))
        writer.write(record("a", "second"))
    assert [r.hypothesis for r in read_records(path)] == ["first"]
    assert "1 records repeat" in caplog.text


@pytest.mark.parametrize(
    "line",
    ["not json", "[1]", '{"id": "a"}', '{"id": 1, "reference": "", "hypothesis": "", "seconds": 1}'],
    ids=["text", "list", "too-little", "kind"],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "dev.jsonl"
    with RecordWriter(path) as writer:
        writer.write(record("a", "a"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"dev\.jsonl, line 2"):
        read_records(path)


def test_summary_is_plain_json_without_nan():
    document = summary({"dev": result(HAND), "silence": result([record("", "")])})
    parsed = json.loads(json.dumps(document, allow_nan=False))
    assert parsed == document
    dev = parsed["splits"]["dev"]
    assert dev["raw"]["wer"] == 6 / 12
    assert (dev["raw"]["substitutions"], dev["raw"]["deletions"], dev["raw"]["insertions"]) == (1, 3, 2)
    assert [group["name"] for group in dev["by_speaker"]] == ["ann", "bob"]
    assert parsed["splits"]["silence"]["raw"]["wer"] is None


class Page(HTMLParser):
    """Checks that elements nest; collects texts and the ids of the page."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.ids, self.texts, self.attributes = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.texts.append(data)


NASTY = '<script>alert("x")</script> & $\\frac{1}{2}$'


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "eval" / "report.html"
    hostile = [record(f"one {NASTY} two", f"{NASTY} </main> two", id=f"<i>{NASTY}", speaker=NASTY, loop=True)]
    splits = {
        "test-clean": result(corpus(), peak_memory=3 * 2**30),
        NASTY: result([*hostile, record("", "", id="b", speaker="b"), record("ok ok", "ok", id="c", speaker="c")]),
        "runaway": result([record("stop", "stop" + " now" * 500)]),
        "silence": result([record("", "")]),
    }
    write_report(path, splits)
    write_report(again := path.with_name("again.html"), splits)
    assert path.read_bytes() == again.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["again.html", "report.html"]
    return path.read_text(encoding="utf-8")


def test_report_is_well_formed_and_escaped(report):
    page = Page()
    page.feed(report)
    page.close()
    assert page.open == []
    assert "script" not in page.seen
    assert len(page.ids) == len(set(page.ids))
    assert page.seen.count("h2") == 5  # four splits and the reading aid
    assert page.seen.count("svg") == 5  # one over all, one per split
    text = " ".join(page.texts)
    assert NASTY in text
    assert "$\\frac{1}{2}$" in text  # not taken for a formula by the plot either
    assert "<script>alert" not in report


def test_report_refers_to_nothing_outside(report):
    assert not re.search(r"https?://", report)
    page = Page()
    page.feed(report)
    links = [value for name, value in page.attributes if name in {"src", "href", "xlink:href", "action"}]
    assert links
    assert all(link.startswith("#") and link[1:] in page.ids for link in links)
    used = set(re.findall(r"url\(#(\w+)\)", report))
    assert used <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)", report)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_report_tells_the_numbers_and_the_alignment(report):
    rate = score(corpus()).raw.words.rate
    assert f"<strong>{100 * rate:.2f} %</strong>" in report
    assert "3.00 GiB" in report
    text = unescape(re.sub(r"<[^>]*>", "", report))
    assert "… and 460 words more" in text  # a run-away doesn't bury the page
    assert text.count("(inserted:) now") == 40
    assert "(recognised as)" in text
    assert "(deleted)" in text


def test_report_is_named_after_the_splits_not_their_perturbations(tmp_path):
    rows = ("dev, clean", "dev, clean, speed 0.9", "dev, clean, noise 0 dB", "other")
    write_report(tmp_path / "report.html", dict.fromkeys(rows, result(HAND)))
    (title,) = re.findall("<title>(.*)</title>", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert title == "Error rates: dev, clean · other"


def test_report_replaces_stand_in_colours(report):
    assert not re.search(r"#0[1-7]0[1-7]0[1-7]\b", report)
    plot = report[report.index("<svg") : report.index("</svg>")]
    assert all(f"var(--{name})" in plot for name in ("sub", "del", "ins", "ink", "muted", "rule", "page"))


def test_table_fits_a_narrow_terminal():
    splits = {"test-clean, noise at 10 dB [a/]": result(corpus(), peak_memory=2**30), "hand": result(HAND, left_out=3)}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(score_table(splits))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "36.36" in text  # the CER, 20 of 55
    assert re.search(r"hand +4 +5\.5 s( +–){3} +1 +1 +3 ", text)  # loops, empty, left out
    assert "[a/]" in text
    assert "…" not in text  # no figure is cut
