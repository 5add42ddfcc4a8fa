"""How good a model's answers are: records on disk, metrics with their intervals, a table, a summary, a report.

    with RecordWriter("output/eval/test-clean.jsonl") as writer:
        writer.write(EvalRecord(id=..., reference=..., hypothesis=..., seconds=...))
    records = read_records("output/eval/test-clean.jsonl")
    results = {"test-clean": SplitResult("transcribe", TranscriptScores(records), Cost.of(records))}
    score_table(results), summary(results), write_report("output/eval/report.html", results)

A mission brings a class of `TaskScores`; nothing here knows of missions, models or audio.
"""

from rwkv_speech.scoring.answers import AnswerScores
from rwkv_speech.scoring.captions import CaptionScores
from rwkv_speech.scoring.conversations import ConversationScores
from rwkv_speech.scoring.labels import LabelScores
from rwkv_speech.scoring.languages import spaced
from rwkv_speech.scoring.normalise import (
    NORMALIZERS,
    lower_case,
    normalise_basic,
    normalise_english,
    normaliser_name,
    normalizer_for,
)
from rwkv_speech.scoring.records import EvalRecord, RecordWriter, read_records
from rwkv_speech.scoring.report import score_table, summary, write_report
from rwkv_speech.scoring.scores import Cost, Metric, MetricKind, SplitResult, TaskScores, bootstrap, bootstrap_interval
from rwkv_speech.scoring.transcripts import TranscriptScores
from rwkv_speech.scoring.translations import TranslationScores
from rwkv_speech.scoring.words import (
    CER,
    MER,
    WER,
    Aligned,
    Edits,
    Group,
    TextScores,
    align,
    by_length,
    by_speaker,
    leading_kind,
    worst,
)

__all__ = [
    "CER", "MER", "NORMALIZERS", "WER", "Aligned", "AnswerScores", "CaptionScores", "ConversationScores", "Cost",
    "Edits", "EvalRecord", "Group", "LabelScores", "Metric", "MetricKind", "RecordWriter", "SplitResult", "TaskScores",
    "TextScores", "TranscriptScores", "TranslationScores", "align", "bootstrap", "bootstrap_interval", "by_length",
    "by_speaker", "leading_kind", "lower_case", "normalise_basic", "normalise_english", "normaliser_name",
    "normalizer_for", "read_records", "score_table", "spaced", "summary", "worst", "write_report",
]  # fmt: skip
