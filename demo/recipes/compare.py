"""Word error rates of several systems on the same utterances, in one table.

`python compare.py --train MANIFESTS ours=a.jsonl FOLDER`: a file of hypotheses under a name, or all those of a folder.
Sentences that occur in the manifests of training have a column of their own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rwkv_speech.data.sources import load_split
from rwkv_speech.errors import UserError
from rwkv_speech.scoring import EvalRecord, TranscriptScores, read_records


def systems(sources: Sequence[str]) -> dict[str, list[EvalRecord]]:
    found = {}
    for source in sources:
        name, _, path = source.rpartition("=")
        paths = [Path(path)] if name else sorted(Path(path).glob("*.jsonl"))
        found |= {name or file.stem: read_records(file) for file in paths}
    return found


def rate(records: Sequence[EvalRecord]) -> str:
    """WER after Whisper's normaliser, with its 95 % interval."""
    if not records:
        return "-"
    texts = TranscriptScores(records).normalised
    low, high = texts.interval
    return f"{100 * texts.words.rate:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the data, for the heading")
    parser.add_argument("--train", required=True, help="manifests of training, joined by +")
    parser.add_argument("sources", nargs="+")
    args = parser.parse_args()
    met = {utterance.text for utterance in load_split(args.train)}
    found = systems(args.sources)
    ids = [{record.id for record in records} for records in found.values()]
    if any(some != ids[0] for some in ids):
        raise SystemExit("the systems were not evaluated on the same utterances: remove the older hypotheses")
    first = next(iter(found.values()))
    known = sum(record.reference in met for record in first)
    table = Table(title=f"{args.name}: WER, % (95 % interval)")
    for heading in ("", f"all {len(first)}", f"new sentences, {len(first) - known}", f"met in training, {known}"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, records in found.items():
        new, old = ([r for r in records if (r.reference in met) == seen] for seen in (False, True))
        table.add_row(name, rate(records), rate(new), rate(old))
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
