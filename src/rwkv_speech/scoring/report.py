"""The results of an evaluation: in the terminal, in `summary.json`, and on one page to be opened from disk."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from rwkv_speech.files import write_whole
from rwkv_speech.scoring.formats import counted, duration, figure, html_table, memory, terminal_table
from rwkv_speech.scoring.scores import CONFIDENCE, RESAMPLES, SEED, Cost, SplitResult, TaskScores

SHORT = {"Utterances": "Utt.", "Utterances/s": "Utt/s", "Peak memory": "Memory"}  # heads in the terminal
TERMS = {
    "95 % interval": f"Percentile bootstrap over utterances, {RESAMPLES:,} resamples (Bisani and Ney, 2004). It takes "
    "utterances for independent; few speakers with many of them make the true interval wider.",
    "Left out": "Utterances whose audio could not be used; they count nowhere else.",
    "RTF": "Real-time factor: seconds of work per second of audio.",
}

# Colours: after Okabe and Ito (2008), whose hues stay apart in the common kinds of colour blindness; darkened
# or lightened per theme. Words keep the colour of ink on a tint, so that contrast doesn't depend on the
# hue, and every kind of error has a line of its own: wavy, struck through, double.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #fdfdfb; --ink: #1d2023; --muted: #5d646b; --rule: #d9dcde; --shade: #f3f4f2;
  --sub: #d55e00; --del: #0072b2; --ins: #b3609a;
  --sub-tint: #fde5d4; --del-tint: #d9ebf7; --ins-tint: #f5e1ee;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181b; --ink: #e7e9ea; --muted: #a0a8ae; --rule: #353b40; --shade: #1d2125;
    --sub: #ee8a3c; --del: #56b4e9; --ins: #d893bd;
    --sub-tint: #55300f; --del-tint: #123e59; --ins-tint: #522f45;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3.5rem 0 .2rem; padding-top: 1.2rem; border-top: 1px solid var(--rule);
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; max-width: 52rem; }
a { color: inherit; text-underline-offset: .2em; }
.note, figcaption { color: var(--muted); font-size: .9rem; }
.lead strong { font-size: 1.15em; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: .8rem 0 0; padding: 0;
  font-size: .9rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
.wide:focus-visible, summary:focus-visible { outline: 2px solid var(--del); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
caption { text-align: left; color: var(--muted); padding-bottom: .3rem; }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; vertical-align: baseline; }
th:first-child { padding-left: 0; }
th[scope=row], th.text, td.text { text-align: left; }
thead th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--muted); }
tbody th, td.main { font-weight: 600; }
tbody tr.first > * { border-top: 1px solid var(--rule); }
tbody:first-of-type tr.first:first-child > * { border-top: 0; }
figure { margin: 1rem 0 0; }
figure svg { display: block; width: 100%; max-width: 48rem; height: auto; }
figure svg text { font-family: inherit !important; }
details { margin: .8rem 0; }
summary { cursor: pointer; width: fit-content; }
ol.worst { list-style: none; margin: 0; padding: 0; }
ol.worst > li { border-top: 1px solid var(--rule); padding: .8rem 0 .9rem; break-inside: avoid; }
.aligned { display: flex; flex-wrap: wrap; gap: .3rem .1rem; margin-top: .35rem; line-height: 1.35; }
.pair { display: grid; grid-template-rows: auto auto; padding: .1rem .25rem; border-radius: .2rem;
  overflow-wrap: anywhere; }
.pair > .hyp { color: var(--muted); }
.sub, .del, .ins { text-align: center; }
.sub > .hyp, .del > .hyp, .ins > .hyp { color: var(--ink); }
.sub { background: var(--sub-tint); } .del { background: var(--del-tint); } .ins { background: var(--ins-tint); }
.sub > .hyp { text-decoration: underline wavy var(--sub) 1px; text-underline-offset: .2em; }
.del > .ref { text-decoration: line-through var(--del) 2px; }
.ins > .hyp { text-decoration: underline double var(--ins); text-underline-offset: .2em; }
.key { gap: .3rem 1.2rem; font-size: .9rem; color: var(--muted); margin: .6rem 0 .9rem; }
.key .pair { display: inline-grid; vertical-align: middle; margin-right: .35rem; color: var(--ink); }
.flag { border: 1px solid currentColor; border-radius: .2rem; padding: 0 .3rem; font-size: .8rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
dl { font-size: .9rem; max-width: 52rem; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; color: var(--muted); }
@media print { main { max-width: none; } .wide { overflow: visible; } }
"""

# Forbids the page every request, so that it shows the same with or without a network.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def score_table(results: Mapping[str, SplitResult]) -> Group:
    """For the terminal: the scores of all splits, by mission, then the cost of each; fits 80 columns."""
    parts = []
    for kind, splits in _by_mission(results).values():
        parts.append(terminal_table({name: s.rows() for name, s in splits.items()}, without=kind.report_only))
        texts = "; ".join(f"{form}: {how}" for form, how in _joined(s.texts() for s in splits.values()).items())
        parts.append(Text(f"{kind.caption}{'; ' * bool(texts)}{texts}\n", style="dim"))
    costs = {name: [{SHORT.get(k, k): v for k, v in _cost(r.cost).items()}] for name, r in results.items()}
    return Group(*parts, terminal_table(costs, without=("Empty ref.",)))


def summary(results: Mapping[str, SplitResult]) -> dict[str, Any]:
    """The results of all splits as JSON holds them: rates are fractions, null where undefined.

    All that depends on the machine and the moment stands under `speed`; the rest follows from the records.
    """
    return {
        "texts": _joined(result.scores.texts() for result in results.values()),
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED, "unit": "utterance"},
        "splits": {name: _split_summary(result) for name, result in results.items()},
    }


def write_report(path: str | os.PathLike, results: Mapping[str, SplitResult]) -> None:
    """Write the report: a scoreboard of each mission over its splits, then for each split what its mission shows.

    The file holds its style and its plots (SVG), refers to nothing outside itself, and appears under its name
    only when it is whole. The same results give the same bytes.

    Args:
        path: where to; the folder is made where it is missing.
        results: name of the split -> result, in the order of the report.
    """
    kinds = dict.fromkeys(kind for kind, _ in _by_mission(results).values())
    title = f"{' and '.join(kind.title for kind in kinds)}: {_listed(list(results))}"
    terms = _joined(result.scores.terms() for result in results.values()) | TERMS
    sections = "".join(
        f'<section aria-labelledby="split-{index}"><h2 id="split-{index}">{escape(name)}</h2>'
        f"{result.scores.sections(name)}</section>"
        for index, (name, result) in enumerate(results.items())
    )
    entries = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    aid = f"<section><h2>How to read this</h2><dl>{entries}</dl></section>"
    write_whole(Path(path), _page(title, _head(title, results) + sections + aid).encode())


def _head(title: str, results: Mapping[str, SplitResult]) -> str:
    costs = {name: result.cost for name, result in results.items()}
    utterances = sum(cost.utterances for cost in costs.values())
    seconds = sum(cost.audio_seconds for cost in costs.values())
    links = "".join(f'<li><a href="#split-{i}">{escape(name)}</a></li>' for i, name in enumerate(results))
    missions = _by_mission(results)
    scores = "".join(
        f"<h3>Accuracy{f': {escape(mission)}' if len(missions) > 1 else ''}</h3>"
        f"{html_table(kind.caption, {name: s.rows() for name, s in splits.items()})}{kind.plot(splits)}"
        for mission, (kind, splits) in missions.items()
    )
    return (
        f'<h1>{escape(title)}</h1><p class="note">{counted(len(results), "split")}, '
        f"{counted(utterances, 'utterance')}, {duration(seconds)} of audio</p>"
        + (f'<nav aria-label="Splits"><ul>{links}</ul></nav>' if len(results) > 1 else "")
        + f"{scores}<h3>Cost and health</h3>"
        + html_table("Speed of one process", {name: [_cost(cost)] for name, cost in costs.items()})
    )


def _cost(cost: Cost) -> dict[str, str]:
    """A line of the table of costs."""
    return {
        "Utterances": f"{cost.utterances:,}",
        "Audio": duration(cost.audio_seconds),
        "RTF": figure(cost.real_time_factor),
        "Utterances/s": figure(cost.utterances_per_second),
        "Peak memory": memory(cost.peak_memory),
        "Loops": f"{cost.loops:,}",
        "Empty out": f"{cost.empty_outputs:,}",
        "Empty ref.": f"{cost.empty_references:,}",
        "Left out": f"{cost.left_out:,}",
    }


def _split_summary(result: SplitResult) -> dict[str, Any]:
    cost = asdict(result.cost)
    wall_seconds, peak_memory = cost.pop("wall_seconds"), cost.pop("peak_memory")
    return {
        "mission": result.mission,
        "metrics": [metric.summary() for metric in result.scores.metrics],
        **cost,
        **result.scores.summary(),
        "speed": {
            "wall_seconds": wall_seconds,
            "real_time_factor": result.cost.real_time_factor,
            "utterances_per_second": result.cost.utterances_per_second,
            "peak_memory_bytes": peak_memory,
        },
    }


def _by_mission(results: Mapping[str, SplitResult]) -> dict[str, tuple[type[TaskScores], dict[str, TaskScores]]]:
    """Mission -> the class of its scores, and its splits with their scores."""
    missions: dict[str, tuple[type[TaskScores], dict[str, TaskScores]]] = {}
    for name, result in results.items():
        _, splits = missions.setdefault(result.mission, (type(result.scores), {}))
        splits[name] = result.scores
    return missions


def _joined(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {name: text for part in parts for name, text in part.items()}


def _listed(names: list[str]) -> str:
    """The splits by name; a split that was perturbed, `name, how`, isn't named beside the plain one."""
    plain = [name for name in names if name.rpartition(", ")[0] not in names]
    return " · ".join(plain[:3]) + (f" and {len(plain) - 3} more" if len(plain) > 3 else "")


def _page(title: str, body: str) -> str:
    """A whole HTML document; `title` is text, `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
