"""How good a model's answers are: records on disk, metrics with their intervals, a table, a summary, a report.

    with RecordWriter("output/eval/test-clean.jsonl") as writer:
        writer.write(EvalRecord(id=..., reference=..., hypothesis=..., seconds=...))
    records = read_records("output/eval/test-clean.jsonl")
    results = {"test-clean": SplitResult("transcribe", TranscriptScores(records), Cost.of(records))}
    score_table(results), summary(results), write_report("output/eval/report.html", results)

A mission brings a class of `TaskScores`; nothing here knows of missions, models or audio.
"""

from rwkv_speech.scoring.normalise import lower_case, normalise_english, normaliser_name
from rwkv_speech.scoring.records import EvalRecord, RecordWriter, read_records
from rwkv_speech.scoring.report import score_table, summary, write_report
from rwkv_speech.scoring.scores import (
    Cost,
    ExactScores,
    Metric,
    MetricKind,
    SplitResult,
    TaskScores,
    bootstrap_interval,
)
from rwkv_speech.scoring.transcripts import WER, TranscriptScores, leading_kind
from rwkv_speech.scoring.words import Aligned, Edits, Group, TextScores, align, by_length, by_speaker, worst

__all__ = [
    "WER", "Aligned", "Cost", "Edits", "EvalRecord", "ExactScores", "Group", "Metric", "MetricKind", "RecordWriter",
    "SplitResult", "TaskScores", "TextScores", "TranscriptScores", "align", "bootstrap_interval", "by_length",
    "by_speaker", "leading_kind", "lower_case", "normalise_english", "normaliser_name", "read_records", "score_table",
    "summary", "worst", "write_report",
]  # fmt: skip
