"""The course of a run as a picture: loss, learning rates, word error rate of the validation, throughput."""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANELS = (
    ("loss", "log", {"loss": "training", "valid_loss": "validation", "ctc_loss": "CTC alignment"}),
    ("learning rate", "linear", {"lr": "adapter", "state_lr": "initial state"}),
    ("validation WER, %", "linear", {"valid_wer": None}),
    ("seconds of audio per second", "linear", {"audio_s_per_s": None}),
)


def draw(rows: Sequence[dict[str, float]]) -> bytes:
    """A PNG of the rows of `metrics.csv`: each has a step, and whichever columns were measured there."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no window, no global state
    for axes, (title, scaling, curves) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for column, label in curves.items():
            points = [(row["step"], row[column]) for row in rows if column in row]
            if points:
                scale = 100 if column == "valid_wer" else 1
                marker = "o" if column.startswith("valid") or len(points) == 1 else None
                steps, values = zip(*points, strict=True)
                axes.plot(steps, [value * scale for value in values], marker=marker, ms=3, lw=1, label=label)
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="gray")
        else:
            axes.set_yscale(scaling)
            if None not in curves.values():
                axes.legend()
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()
