"""The scoreboard in the terminal."""

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .formats import duration, figure, memory, percent, percent_range
from .normalise import normaliser_name
from .rates import Scores


def score_table(splits: Mapping[str, Scores]) -> Group:
    """Two lines per split, raw above normalised, then a line for the work that it was; fits 80 columns."""
    errors = _table("Text", "WER %", "95 %", "CER %", "Sub", "Del", "Ins", "SER %")
    work = _table("Utt.", "Audio", "Loops", "Empty", "Left out", "RTF", "Utt/s", "Memory")
    for name, scores in splits.items():
        for head, label, texts in ((name, "raw", scores.raw), ("", "norm.", scores.normalised)):
            errors.add_row(
                Text(head, style="bold"),
                label,
                Text(percent(texts.words.rate), style="bold"),
                percent_range(texts.interval),
                percent(texts.characters.rate),
                f"{texts.words.substitutions:,}",
                f"{texts.words.deletions:,}",
                f"{texts.words.insertions:,}",
                percent(texts.sentence_error_rate, 1),
            )
        work.add_row(
            Text(name, style="bold"),
            f"{scores.utterances:,}",
            duration(scores.audio_seconds),
            f"{scores.loops:,}",
            f"{scores.empty_outputs:,}",
            f"{scores.left_out:,}",
            figure(scores.real_time_factor),
            figure(scores.utterances_per_second),
            memory(scores.peak_memory),
        )
    return Group(errors, Text(f"raw: lower-cased; norm.: after {normaliser_name()}\n", style="dim"), work)


def _table(*figures: str) -> Table:
    table = Table("Split", box=None, padding=(0, 1), show_edge=False)
    table.columns[0].overflow = "fold"
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
