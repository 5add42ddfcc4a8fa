"""The scoreboard in the terminal."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from .formats import counted, duration, figure, memory, percent, percent_range
from .normalise import normaliser_name
from .rates import Scores


def score_table(splits: Mapping[str, Scores]) -> Table:
    """One block per split, its raw line above its normalised one; fits 80 columns."""
    table = Table(caption=f"raw: lower-cased; norm.: after {normaliser_name()}", caption_justify="left")
    table.add_column("Split", overflow="fold")
    table.add_column("Text")
    for heading in ("WER %", "95 %", "CER %", "Sub", "Del", "Ins", "SER %"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.box, table.padding, table.show_edge = None, (0, 1), False
    for name, scores in splits.items():
        heads = (Text(name, style="bold"), Text(_cost(scores), style="dim"))
        for head, label, texts in zip(heads, ("raw", "norm."), (scores.raw, scores.normalised), strict=True):
            table.add_row(
                head,
                label,
                Text(percent(texts.words.rate), style="bold"),
                percent_range(texts.interval),
                percent(texts.characters.rate),
                f"{texts.words.substitutions:,}",
                f"{texts.words.deletions:,}",
                f"{texts.words.insertions:,}",
                percent(texts.sentence_error_rate, 1),
            )
        table.add_section()
    return table


def _cost(scores: Scores) -> str:
    facts = [f"{counted(scores.utterances, 'utterance')}, {duration(scores.audio_seconds)}"]
    facts.append(f"mean of WERs {percent(scores.raw.mean_utterance_wer)} %")
    if scores.loops or scores.empty_outputs:
        facts.append(f"{counted(scores.loops, 'loop')}, {scores.empty_outputs:,} empty")
    if scores.wall_seconds:
        facts.append(f"RTF {figure(scores.real_time_factor)}, {figure(scores.utterances_per_second)} utt/s")
    if scores.peak_memory is not None:
        facts.append(memory(scores.peak_memory))
    return "\n".join(facts)
