"""How good the transcripts are: records on disk, error rates with their uncertainty, a report to look at.

    with RecordWriter("output/eval/test-clean.jsonl") as writer:
        writer.write(EvalRecord(id=..., reference=..., hypothesis=..., seconds=...))
    splits = {"test-clean": score(read_records("output/eval/test-clean.jsonl"))}
    summary(splits), score_table(splits), write_report("output/eval/report.html", splits)

Nothing here knows of models or audio: records go in, numbers come out.
"""

from .normalise import lower_case, normalise_english, normaliser_name
from .rates import Aligned, Edits, Scores, TextScores, align, bootstrap_interval, score
from .records import EvalRecord, RecordWriter, read_records
from .report import write_report
from .summary import Group, by_length, by_speaker, summary, worst
from .table import score_table

__all__ = [
    "Aligned",
    "Edits",
    "EvalRecord",
    "Group",
    "RecordWriter",
    "Scores",
    "TextScores",
    "align",
    "bootstrap_interval",
    "by_length",
    "by_speaker",
    "lower_case",
    "normalise_english",
    "normaliser_name",
    "read_records",
    "score",
    "score_table",
    "summary",
    "worst",
    "write_report",
]
