"""What missions.sh needs: manifests of its lines, what else the same frozen frames give, and the table."""

import argparse
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from baselines import probe_texts, whisper_texts, write
from manifests import write_manifest
from rich.console import Console
from rich.table import Table

from rwkv_speech.data.sample import Message, Row
from rwkv_speech.data.sources import load_split
from rwkv_speech.errors import UserError
from rwkv_speech.missions import get_mission
from rwkv_speech.scoring import Metric, read_records
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.encoder import import_transformers
from rwkv_speech.speech.frame_cache import FrameCache
from rwkv_speech.speech.recording import Recording

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
SUMS = {"train": 4000, "test": 300}
PAUSE = 0.2  # seconds between two digits
CONSTANT_FROM = 200  # training answers among which the best constant one is searched
SEED = 1


def sums(rows: Sequence[Row], count: int, folder: Path) -> list[Row]:
    """Recordings of two digits of one speaker, and their sum; files that are there stay."""
    rng, by_speaker = random.Random(SEED), _by_speaker(rows)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        speaker = rng.choice(sorted(by_speaker))
        both = rng.sample(by_speaker[speaker], 2)
        path = folder / f"{number}.flac"
        if not path.exists():
            first, second = (row.audio.waveform().numpy() for row in both)
            pause = np.zeros(int(PAUSE * SAMPLE_RATE), np.float32)
            unfinished = path.with_suffix(".part")
            soundfile.write(unfinished, np.concatenate([first, pause, second]), SAMPLE_RATE, format="FLAC")
            unfinished.replace(path)
        total = sum(ONES.index(row.text) for row in both)
        audio = Recording(str(path))
        made.append(Row(f"{number}-{both[0].id}-{both[1].id}", ONES[total], audio, speaker, "en", prompt="add: "))
    return made


ROUNDS = 5
# Conversations of each kind, which is what a round asks for: see `rounds`. Each is learnt from once: of a few thousand
# that come again, the answers are known by heart.
TALKS = {"sum": 16_000, "total": 24_000, "first": 2_000}
TIMES_SAID = 2  # how often each digit is a transcript, too: CTC aligns only those, and all is heard better
TESTED = 100

# Scores of the table by kind of mission; of others the first.
SHOWN = {"transcribe": ("wer", "cer"), "translate": ("bleu", "chrf++")}


def rounds(rows: Sequence[Row], kind: str, count: int) -> list[Row]:
    """Conversations of one speaker who says a digit in each round.

    kind: what the answer is: "sum", of this digit and the one before; "total", of all so far; "first", the digit
        itself, and in the last round, which is typed, the one of the first round.
    """
    rng, by_speaker, found = random.Random(f"{SEED}-{kind}"), _by_speaker(rows), []
    for number in range(count):
        speaker = rng.choice(sorted(by_speaker))
        messages, digits = [], []
        for place in range(ROUNDS):
            if kind == "first" and place == ROUNDS - 1:
                said, answer = "first?", digits[0]
            else:
                row = rng.choice(by_speaker[speaker])
                digits.append(ONES.index(row.text))
                said = row.audio
                answer = {"sum": sum(digits[-2:]), "total": sum(digits), "first": digits[-1]}[kind]
            messages += [Message("user", (said,)), Message("assistant", (in_words(answer),))]
        name = f"converse/{kind}"
        found.append(Row(f"{kind}-{number}", None, None, speaker, "en", mission=name, messages=tuple(messages)))
    return found


def _by_speaker(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.speaker, []).append(row)
    return found


def in_words(number: int) -> str:
    """A number below 60."""
    if number < len(ONES):
        return ONES[number]
    ten, one = ("twenty", "thirty", "forty", "fifty")[number // 10 - 2], number % 10
    return f"{ten} {ONES[one]}" if one else ten


# Line -> its mission, its folder, the manifests of its halves, and what a row becomes.
LINES: dict[str, tuple[str, str, str, Callable[[Row], Row]]] = {
    "esc-10": ("label", "esc-10", "{}/manifest.jsonl", lambda row: row),
    "emodb-4": ("label", "emodb-4", "{}/manifest.jsonl", lambda row: row),
    "speaker": ("label", "fsdd", "{}.jsonl", lambda row: replace(row, text=row.speaker)),
    "language": ("label", "asterisk-5lang", "{}/asr.jsonl", lambda row: replace(row, text=row.language)),
    "digits": ("transcribe", "fsdd", "{}-speakers.jsonl", lambda row: replace(row, language="en")),
    "arabic": ("transcribe", "arabic-digits", "{}/manifest.jsonl", lambda row: row),
    "mandarin": ("transcribe", "aishell-sample", "{}/manifest.jsonl", lambda row: row),
    "russian": ("transcribe", "festvox-ru", "{}/manifest.jsonl", lambda row: row),
    "translate": ("translate", "asterisk-5lang", "{}/manifest.jsonl", lambda row: row),
    "sums": ("answer", "fsdd", "{}-speakers.jsonl", lambda row: row),
    "rounds": ("converse", "fsdd", "{}-speakers.jsonl", lambda row: row),
}


def write_manifests(line: str, data: Path, out: Path) -> None:
    """`train.jsonl` and `test.jsonl` of a line.

    Of conversations also `test-fresh.jsonl`, their last rounds alone, and `test-text.jsonl`, with what was said before
    typed; in training, the digits as transcripts stand beside them.
    """
    mission, folder, name, change = LINES[line]
    for half in ("train", "test"):
        rows = load_split(str(data / folder / name.format(half)))
        if line == "sums":
            rows = sums(rows, min(SUMS[half], 2 * len(rows)), out / half)
        if line == "rounds":
            counts = TALKS if half == "train" else dict.fromkeys(TALKS, TESTED)
            talks = [row for kind, count in counts.items() for row in rounds(rows, kind, min(count, 12 * len(rows)))]
            said = range(TIMES_SAID if half == "train" else 0)
            rows = talks + [replace(row, id=f"{row.id}-{i}", mission="transcribe") for i in said for row in rows]
        else:
            rows = [replace(change(row), mission=mission) for row in rows]
        write_manifest(out / f"{half}.jsonl", rows)
    if line == "rounds":
        write_manifest(out / "test-fresh.jsonl", [replace(row, messages=row.messages[-2:]) for row in rows])
        write_manifest(out / "test-text.jsonl", [replace(row, messages=typed(row.messages)) for row in rows])


def typed(messages: Sequence[Message]) -> tuple[Message, ...]:
    """A conversation in which all but the last round was typed: the digits that were said, which files are named by."""
    *before, last, answer = messages
    words = [
        Message("user", (ONES[int(message.parts[0].source.name.split("_")[0])],)) if message.role == "user" else message
        for message in before
    ]
    return *words, last, answer


def logistic_regression(cache: FrameCache, train: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """On mean and standard deviation of the frames; C by five-fold cross-validation on the training half."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def statistics(rows: Sequence[Row]) -> np.ndarray:
        cache.fill([row.audio for row in rows])
        frames = (cache.read(row.audio)[0].float() for row in rows)
        return np.stack([torch.cat([x.mean(0), x.std(0, correction=0)]).numpy() for x in frames])

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    search = GridSearchCV(model, {"logisticregression__C": [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]}, cv=5)
    return list(search.fit(statistics(train), [row.text for row in train]).predict(statistics(test)))


def constant(train: Sequence[Row]) -> str:
    """The answer that, of a sample of the training half's, scores best there when it is always given."""
    mission = get_mission(train[0].mission)
    some = random.Random(SEED).sample(list(train), min(CONSTANT_FROM, len(train)))

    def score(text: str) -> float:
        metrics = mission.score([mission.record(row, text, seconds=1.0) for row in some]).metrics
        # Of translations chrF++, since BLEU is zero for nearly all.
        return metrics[-1 if mission.name == "translate" else 0].value

    frequent = Counter(row.text for row in some).most_common()
    return max((text for text, _ in frequent), key=score)


def write_baselines(args: argparse.Namespace) -> None:
    cache = FrameCache(args.cache, storage="fp16")
    cache.encoder(args.encoder)
    train, test = (load_split(str(args.line / f"{half}.jsonl")) for half in ("train", "test"))
    kind = get_mission(test[0].mission).name
    folder = args.line / "baselines"
    folder.mkdir(exist_ok=True)
    config = import_transformers().AutoConfig.from_pretrained(args.decoder)
    task = kind if kind in ("transcribe", "translate") else None  # what Whisper calls them, too
    multilingual = config.vocab_size > 51_864  # as many tokens have those that know English only
    found: dict[str, Callable[[], list[str]]] = {}
    if kind == "label":
        majority = Counter(row.text for row in train).most_common(1)[0][0]
        found["majority"] = lambda: [majority] * len(test)
        found["logistic regression"] = lambda: logistic_regression(cache, train, test)
    elif kind == "transcribe":
        found["CTC probe"] = lambda: probe_texts(cache, train, test, args.steps, args.line / "probe.pth")
    elif kind != "converse":  # which its other test manifests are compared with
        found["constant"] = lambda: [constant(train)] * len(test)
    if task and (multilingual or all(row.language == "en" for row in test)):
        found["Whisper"] = lambda: whisper_texts(args.decoder, test, task if multilingual else None)
    for name, texts in found.items():
        if not (path := folder / f"{name}.jsonl").exists():
            write(path, test, texts())


def figures(metrics: Sequence[Metric]) -> str:
    found = []
    for metric in metrics:
        scale, interval = 100 if metric.kind.percent else 1, metric.interval
        found.append(f"{scale * metric.value:.1f} ({scale * interval[0]:.1f} to {scale * interval[1]:.1f})")
    return "\n".join(found)


def print_table(project: Path) -> None:
    """A line for each mission; `table.json` has the same figures."""
    table, kept = Table(title="Test halves, with 95 % intervals"), {}
    for heading in ("", "test", "score", "ours", "from the same frames"):
        table.add_column(heading, justify="right" if heading == "test" else "left")
    for line, (kind, *_) in LINES.items():
        ours = project / line / "eval" / "test.jsonl"
        if not ours.exists():
            continue
        others = sorted((project / line / "baselines").glob("*.jsonl"))
        mission, cells = get_mission(kind), {}
        for name, path in [("ours", ours), *((path.stem, path) for path in others)]:
            records = read_records(path)
            scores = mission.score(records)
            metrics = [metric for metric in scores.metrics if metric.kind.name in SHOWN.get(kind, ())]
            metrics = metrics or scores.metrics[:1]
            cells[name] = figures(metrics)
            kept.setdefault(line, {})[name] = [metric.summary() for metric in metrics]
        labels = "\n".join(metric.kind.label + " %" * metric.kind.percent for metric in metrics)
        rest = "\n".join(f"{name} {line}" for name, text in itertools.islice(cells.items(), 1, None)
                         for line in text.splitlines())  # fmt: skip
        table.add_row(line, str(len(records)), labels, cells["ours"], rest)
    if table.row_count:
        Console().print(table)
    if (project / "rounds" / "eval").exists():
        kept["rounds"] = print_rounds(project / "rounds" / "eval")
    (project / "table.json").write_text(json.dumps(kept, indent=1) + "\n")


def print_rounds(folder: Path) -> dict[str, list[float]]:
    """Of each kind of conversation, what is right round by round, and in the last one with another past."""
    table, kept = Table(title="Conversations: % right, own answers in the state"), {}
    last = f"round {ROUNDS}"
    for heading in ("", *(f"round {n + 1}" for n in range(ROUNDS)), f"{last}, fresh state", f"{last}, past as text"):
        table.add_column(heading, justify="right")
    for kind in TALKS:
        found = []
        for name in ("test", "test-fresh", "test-text"):
            scores = get_mission("converse").score(read_records(folder / f"{name}-converse-{kind}.jsonl"))
            by_round = [x["metrics"][0]["value"] for x in scores.summary()["rounds"]]
            found += by_round if name == "test" else by_round[-1:]
        table.add_row(kind, *(f"{100 * value:.1f}" for value in found))
        kept[kind] = found
    Console().print(table)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lines")
    one = commands.add_parser("manifests")
    for name, kind in (("line", str), ("data", Path), ("out", Path)):
        one.add_argument(name, type=kind)
    one = commands.add_parser("baselines")
    one.add_argument("line", type=Path, help="folder of a line")
    one.add_argument("--encoder", required=True)
    one.add_argument("--decoder", required=True, help="the Whisper that decodes by itself")
    one.add_argument("--cache", required=True, help="folder of cached frames")
    one.add_argument("--steps", type=int, default=1000, help="of the probe's training (default: %(default)s)")
    one = commands.add_parser("table")
    one.add_argument("project", type=Path)
    args = parser.parse_args()
    if args.command == "lines":
        print(*LINES)
    elif args.command == "manifests":
        write_manifests(args.line, args.data, args.out)
    elif args.command == "baselines":
        write_baselines(args)
    else:
        print_table(args.project)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
