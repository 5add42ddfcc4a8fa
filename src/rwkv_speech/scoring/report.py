"""`report.html`: the scores of an evaluation on one page, to be opened from disk and handed on."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .formats import counted, duration, figure, memory, percent, percent_range
from .normalise import normaliser_name
from .page import cells, page, table
from .plots import error_kinds, wer_by_length
from .rates import RESAMPLES, Aligned, Scores
from .summary import Group, by_length, by_speaker, worst

# Column heads; `<` aligns to the left.
ACCURACY = [
    "<Split",
    "<Text",
    "WER",
    "95 % interval",
    "Subst.",
    "Del.",
    "Ins.",
    "Words",
    "CER",
    "SER",
    "Mean WER",
]
COST = [
    "<Split",
    "Utterances",
    "Audio",
    "RTF",
    "Utterances/s",
    "Peak memory",
    "Loops",
    "Empty out",
    "Empty ref.",
    "Left out",
]
GROUPS = ["Utterances", "Audio", "Words", "WER", "95 % interval", "Subst.", "Del.", "Ins."]
LONGEST_RUN = 40  # words shown of one deletion or insertion: a run-away hypothesis must not bury the page


def write_report(path: str | os.PathLike, splits: Mapping[str, Scores]) -> None:
    """Write the report: a scoreboard over all splits, then for each its breakdowns and worst utterances.

    The file holds its style and its plots (SVG), refers to nothing outside itself, and appears under its name
    only when it is whole. The same scores give the same bytes.

    Args:
        path: where to; the folder is made where it is missing.
        splits: name -> scores, one row of the scoreboard each, in this order.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = "".join(_split(index, name, scores) for index, (name, scores) in enumerate(splits.items()))
    title = "Word error rate: " + _listed(list(splits))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page(title, _head(splits, title) + sections + _reading_aid()), encoding="utf-8")
    os.replace(temporary, path)


def aligned_html(utterance: Aligned) -> str:
    """Reference above hypothesis, word by word; an error shows by tint, by line, and in words for the ear."""
    pairs = []
    for operation, reference, hypothesis in utterance.steps:
        if operation == "equal":
            pairs += [_pair("", word, word) for word in reference]
        elif operation == "substitute":
            pairs += [_pair("sub", *words) for words in zip(reference, hypothesis, strict=True)]
        else:
            kind, words = ("del", reference) if operation == "delete" else ("ins", hypothesis)
            shown = words[:LONGEST_RUN]
            if len(words) > len(shown):
                shown = [*shown, f"… and {counted(len(words) - len(shown), 'word')} more"]
            pairs += [_pair(kind, word, "") if kind == "del" else _pair(kind, "", word) for word in shown]
    return f'<div class="aligned">{" ".join(pairs)}</div>'


def _pair(kind: str, reference: str, hypothesis: str) -> str:
    reference, hypothesis = escape(reference), escape(hypothesis)
    blank = '<span aria-hidden="true">·</span>'
    if not kind:
        return (
            f'<span class="pair"><span class="ref">{reference}</span>'
            f'<span class="hyp" aria-hidden="true">{hypothesis}</span></span>'
        )
    said = {"sub": "heard as", "del": "not heard", "ins": "heard in addition:"}[kind]
    return (
        f'<span class="pair {kind}"><span class="ref">{reference or blank}</span> '
        f'<span class="unseen">({said})</span> <span class="hyp">{hypothesis or blank}</span></span>'
    )


def _head(splits: Mapping[str, Scores], title: str) -> str:
    utterances = sum(scores.utterances for scores in splits.values())
    seconds = sum(scores.audio_seconds for scores in splits.values())
    links = "".join(f'<li><a href="#split-{i}">{escape(name)}</a></li>' for i, name in enumerate(splits))
    return (
        f'<h1>{escape(title)}</h1><p class="note">{counted(len(splits), "split")}, '
        f"{counted(utterances, 'utterance')}, {duration(seconds)} of audio</p>"
        + (f'<nav aria-label="Splits"><ul>{links}</ul></nav>' if len(splits) > 1 else "")
        + "<h3>Accuracy</h3>"
        + table(
            "Error rates of the corpus in percent; errors counted in words",
            ACCURACY,
            [row for name, scores in splits.items() for row in _accuracy_rows(name, scores)],
        )
        + f"<figure>{error_kinds(splits)}<figcaption>Raw texts; thin line: 95 % interval of the WER."
        "</figcaption></figure><h3>Cost and health</h3>"
        + table(
            "Speed of one process",
            COST,
            [_cost_row(name, scores) for name, scores in splits.items()],
        )
    )


def _accuracy_rows(name: str, scores: Scores) -> list[str]:
    rows = []
    head = f'<th scope="rowgroup" rowspan="2" class="text">{escape(name)}</th>'
    for label, texts in (("raw", scores.raw), ("normalised", scores.normalised)):
        words = texts.words
        rows.append(
            (f'<tr class="first">{head}' if label == "raw" else "<tr>")
            + cells(label, kind="text")
            + cells(percent(words.rate), kind="main")
            + cells(
                percent_range(texts.interval, 2),
                *(f"{count:,}" for count in (words.substitutions, words.deletions, words.insertions, words.length)),
                percent(texts.characters.rate),
                percent(texts.sentence_error_rate, 1),
                percent(texts.mean_utterance_wer),
            )
            + "</tr>"
        )
    return rows


def _cost_row(name: str, scores: Scores) -> str:
    return (
        f'<tr class="first"><th scope="row">{escape(name)}</th>'
        + cells(
            f"{scores.utterances:,}",
            duration(scores.audio_seconds),
            figure(scores.real_time_factor),
            figure(scores.utterances_per_second),
            memory(scores.peak_memory),
            *(f"{count:,}" for count in (scores.loops, scores.empty_outputs, scores.empty_references, scores.left_out)),
        )
        + "</tr>"
    )


def _split(index: int, name: str, scores: Scores) -> str:
    lengths, speakers = by_length(scores.raw.aligned), by_speaker(scores.raw.aligned)
    words = scores.raw.words
    return (
        f'<section aria-labelledby="split-{index}"><h2 id="split-{index}">{escape(name)}</h2>'
        f'<p class="lead">WER <strong>{percent(words.rate)} %</strong> over {counted(words.length, "word")} '
        f"(95 % interval {percent_range(scores.raw.interval, 2)}); "
        f"{percent(scores.normalised.words.rate)} % after normalisation.</p><h3>By length</h3>"
        f"<figure>{wer_by_length(name, lengths)}<figcaption>WER with its 95 % interval, by seconds of audio."
        "</figcaption></figure><details><summary>The figures</summary>"
        + _groups("Word errors by length", "<Audio length", lengths)
        + f"</details>{_speakers(speakers)}{_worst(scores)}</section>"
    )


def _speakers(speakers: Sequence[Group]) -> str:
    rates = [group.words.rate for group in speakers if group.words.length]
    if len(rates) < 2:
        return ""
    return (
        f"<h3>By speaker</h3><p>{counted(len(speakers), 'speaker')}, WER from {percent(rates[-1], 1)} % to "
        f"{percent(rates[0], 1)} %, half of them up to {percent(rates[len(rates) // 2], 1)} %.</p>"
        f"<details><summary>Every speaker</summary>"
        f"{_groups('Word errors by speaker, highest rate first', '<Speaker', speakers)}</details>"
    )


def _groups(caption: str, first: str, groups: Sequence[Group]) -> str:
    rows = [
        f'<tr><th scope="row">{escape(group.name)}</th>'
        + cells(f"{group.utterances:,}", duration(group.audio_seconds), f"{group.words.length:,}")
        + cells(percent(group.words.rate), kind="main")
        + cells(
            percent_range(group.interval),
            *(f"{n:,}" for n in (group.words.substitutions, group.words.deletions, group.words.insertions)),
        )
        + "</tr>"
        for group in groups
    ]
    return table(caption, [first, *GROUPS], rows)


def _worst(scores: Scores) -> str:
    utterances = worst(scores.raw.aligned)
    if not utterances:
        return "<h3>Worst utterances</h3><p>None: every word is right.</p>"
    errors = sum(utterance.edits.errors for utterance in utterances)
    return (
        f"<h3>Worst utterances</h3><p>The {counted(len(utterances), 'utterance')} with most wrong words: "
        f"{percent(errors / scores.raw.words.errors, 0)} % of all errors. "
        "Reference above, hypothesis below.</p>"
        '<div class="aligned key">'
        f"<span>{_pair('sub', 'said', 'heard')}substitution</span>"
        f"<span>{_pair('del', 'said', '')}deletion</span>"
        f"<span>{_pair('ins', '', 'heard')}insertion</span></div>"
        f'<ol class="worst">{"".join(f"<li>{_facts(u)}{aligned_html(u)}</li>" for u in utterances)}</ol>'
    )


def _facts(utterance: Aligned) -> str:
    record, edits = utterance.record, utterance.edits
    facts = [f"{counted(edits.errors, 'error')} in {counted(edits.length, 'word')}", duration(record.seconds)]
    if record.speaker is not None:
        facts.append(f"speaker {record.speaker}")
    if record.score is not None:
        facts.append(f"mean log-probability {f'{record.score:.2f}'.replace('-', '−')}")
    flags = [name for name, raised in (("loop", record.loop), ("empty", not record.hypothesis.strip())) if raised]
    return (
        f'<div><strong>{escape(record.id)}</strong> <span class="note">{escape(" · ".join(facts))}</span>'
        + "".join(f' <span class="flag">{flag}</span>' for flag in flags)
        + "</div>"
    )


def _reading_aid() -> str:
    terms = {
        "WER, CER": "Substitutions, deletions and insertions per word (character, spaces included) of the "
        "reference, summed over the corpus. Alignments by jiwer.",
        "SER": "Share of the utterances with at least one wrong word.",
        "Mean WER": "Mean over utterances, however short they are. Not the corpus WER; for comparison only.",
        "Raw, normalised": "Raw texts are lower-cased, nothing else. Normalised ones have passed "
        f"{normaliser_name()}, which is meant for English. Plots, breakdowns and worst utterances: raw.",
        "95 % interval": f"Percentile bootstrap over utterances, {RESAMPLES:,} resamples (Bisani and Ney, "
        "2004). It takes utterances for independent; few speakers with many of them make the truth wider.",
        "Empty references": "What is heard there counts as insertions of the corpus; such utterances have no "
        "rate of their own.",
        "Left out": "Utterances whose audio could not be used; they count nowhere else.",
        "RTF": "Real-time factor: seconds of work per second of audio.",
    }
    entries = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return f"<section><h2>How to read this</h2><dl>{entries}</dl></section>"


def _listed(names: list[str]) -> str:
    """The splits by name; a split that was perturbed, `name, how`, goes without saying beside the plain one."""
    plain = [name for name in names if name.rpartition(", ")[0] not in names]
    return " · ".join(plain[:3]) + (f" and {len(plain) - 3} more" if len(plain) > 3 else "")
