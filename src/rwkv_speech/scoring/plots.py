"""The plots of the report, as SVG that takes its colours and letters from the page around it."""

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rwkv_speech.scoring.formats import number
from rwkv_speech.scoring.words import UNITS, Group, TextScores

# matplotlib needs colours, the page has two sets of them (light, dark): each stand-in becomes a CSS variable.
COLOURS = ("--ink", "--muted", "--rule", "--page", "--sub", "--del", "--ins")
VARIABLES = {f"#{i:02}{i:02}{i:02}": name for i, name in enumerate(COLOURS, start=1)}
INK, MUTED, RULE, PAGE, SUB, DEL, INS = VARIABLES
KINDS = (("substitutions", SUB, "///"), ("deletions", DEL, ""), ("insertions", INS, "xxx"))
MOST_LABELS = 30  # in a picture of confusions
STYLE = {
    "svg.fonttype": "none",  # letters stay letters: searchable, and in the page's own font
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.axisbelow": True,
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    **{f"{axis}tick.{part}": colour for axis in "xy" for part, colour in (("color", RULE), ("labelcolor", INK))},
    "ytick.major.size": 0,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}


def error_kinds(splits: Mapping[str, TextScores]) -> str:
    """Stacked bars, one per split: the three kinds of error per 100 units, and the interval of the rate."""
    names, texts = list(splits), list(splits.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.75 + 0.42 * len(names)), layout="constrained")
        axes = figure.subplots()
        start = [0.0] * len(names)
        for kind, colour, hatch in KINDS:
            width = [100 * getattr(t.leading, kind) / max(1, t.leading.length) for t in texts]
            axes.barh(names, width, 0.62, start, label=kind, color=colour, hatch=hatch, edgecolor=PAGE, linewidth=0)
            start = [a + b for a, b in zip(start, width, strict=True)]
        for row, (total, text) in enumerate(zip(start, texts, strict=True)):
            low, high = (total if math.isnan(bound) else 100 * bound for bound in text.interval)
            axes.plot([low, high], [row, row], color=PAGE, linewidth=3.5)  # sets the thin line off the bars
            axes.plot([low, high], [row, row], color=INK, linewidth=1.2, marker="|", markersize=6)
            label = f"{number(text.leading.rate)} %"
            end = (max(total, high), row)
            axes.annotate(label, end, xytext=(6, 0), textcoords="offset points", va="center", weight="bold")
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set_xlim(0, 1.14 * max([1e-9, *(100 * t.interval[1] for t in texts if t.leading.length), *start]))
        nouns = sorted({f"{UNITS[text.lead]}s" for text in texts})
        axes.set_xlabel(f"errors per 100 {' or '.join(nouns)} of the reference")
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.6, borderpad=0)
        return svg(figure, "Errors by kind: " + "; ".join(f"{n} {_kinds(s)}" for n, s in splits.items()))


def rate_by_length(name: str, rate: str, groups: Sequence[Group]) -> str:
    """The error rate of each bucket of lengths with its interval, and under it how many utterances it holds."""
    groups = [group for group in groups if group.edits.length]
    rates = [100 * group.edits.rate for group in groups]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.7), layout="constrained")
        axes = figure.subplots()
        below = [rate - 100 * group.interval[0] for rate, group in zip(rates, groups, strict=True)]
        above = [100 * group.interval[1] - rate for rate, group in zip(rates, groups, strict=True)]
        # The percentile interval of a few utterances may miss the rate itself; a bar can't be negative.
        bars = [[max(0.0, length) for length in side] for side in (below, above)]
        places = range(len(groups))
        look = {"color": INK, "marker": "o", "markersize": 5, "linestyle": "none", "elinewidth": 1.2, "capsize": 4}
        axes.errorbar(places, rates, bars, **look)
        for place, rate in zip(places, rates, strict=True):
            axes.annotate(f"{rate:.1f}", (place, rate), xytext=(8, 0), textcoords="offset points", va="center")
        axes.set_xticks(places, [f"{group.name}\n{group.utterances:,} utt." for group in groups])
        axes.set_xlim(-0.5, len(groups) - 0.3)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{rate} %")
        axes.grid(axis="y")
        label = ", ".join(f"{group.name} {number(group.edits.rate)} %" for group in groups)
        return svg(figure, f"{rate} of {name} by length: {label}")


def confusion_plot(name: str, labels: Sequence[str], counts: np.ndarray) -> str:
    """How often each label (row) was taken for each (column); of many labels, those with most errors.

    counts: (labels, labels).
    """
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    kept = np.sort(np.argsort(-wrong, kind="stable")[:MOST_LABELS])
    part, shown = counts[np.ix_(kept, kept)], [labels[i] for i in kept]
    shares = part / np.maximum(1, counts[kept].sum(1, keepdims=True))
    places = range(len(shown))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 1.2 + 0.32 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for row, column in zip(*part.nonzero(), strict=True):
            share = shares[row, column]
            colour = DEL if row == column else SUB
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, alpha=0.15 + 0.6 * share))
            axes.text(column, row, f"{part[row, column]:,}", ha="center", va="center", fontsize=8)
        axes.set_xticks(places, shown, rotation=90)
        axes.set_yticks(places, shown)
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        rest = f", the {len(shown)} of {len(labels)} with most errors" if len(shown) < len(labels) else ""
        axes.set_xlabel("chosen")
        axes.set_ylabel(f"right label{rest}")
        pairs = sorted(((-part[i, j], i, j) for i, j in zip(*part.nonzero(), strict=True) if i != j))[:5]
        worst = "; ".join(f"{shown[i]} taken for {shown[j]} {-n:,} times" for n, i, j in pairs) or "none"
        return svg(figure, f"Confusions of {name}: {worst}")


def _kinds(texts: TextScores) -> str:
    return ", ".join(f"{getattr(texts.leading, kind):,} {kind}" for kind, _, _ in KINDS)


def svg(figure: Figure, label: str) -> str:
    """The figure, drawn under STYLE, as one `<svg>` element for HTML; `label` is for screen readers."""
    target = io.StringIO()
    # Names inside the drawing are hashes: salted by the label they differ between the plots of a page,
    # and agree between two runs.
    with matplotlib.rc_context({"svg.hashsalt": hashlib.sha256(label.encode()).hexdigest()}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, format="svg", transparent=True, metadata=metadata)
    drawing = target.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for stand_in, variable in VARIABLES.items():
        drawing = drawing.replace(stand_in, f"var({variable})")
    opening, body = drawing.split(">", 1)
    box = opening[opening.index("viewBox=") :].split('"')[1]
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # figure_1, axes_1: referred to by nothing, the same in every plot
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{body}'
