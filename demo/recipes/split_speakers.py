"""Sets speakers of a folder in LibriSpeech's layout aside: train.jsonl and valid.jsonl share no speaker.

Sentences may occur in both; how many do is said here, and they are reported separately in the end.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from rwkv_speech.data.sample import Row
from rwkv_speech.data.sources import load_split
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_whole

SEED = 1


def split_speakers(rows: Sequence[Row], held_out: float) -> tuple[list[Row], list[Row]]:
    """Rows of the speakers to train on, and of those set aside: the part `held_out` of them, at least one.

    Raises:
        SystemExit: there are fewer than two speakers.
    """
    speakers = sorted({row.speaker or "" for row in rows})
    if len(speakers) < 2:
        raise SystemExit("one speaker only: expected at least two, to set one aside")
    random.Random(SEED).shuffle(speakers)
    aside = set(speakers[: max(1, round(held_out * len(speakers)))])
    return [row for row in rows if row.speaker not in aside], [row for row in rows if row.speaker in aside]


def write_manifest(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object to a line. A file that says the same is left alone: training goes by its time."""
    lines = [
        {
            "audio": str(Path(str(row.audio)).resolve()),
            "text": row.text,
            "id": row.id,
            "speaker": row.speaker,
            "duration": row.audio.seconds(),
        }
        for row in rows
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    if not path.exists() or path.read_bytes() != content:
        write_whole(path, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held_out", type=float, default=0.2)
    args = parser.parse_args()
    train, valid = split_speakers(load_split(None, data_dir=args.data_dir), args.held_out)
    sentences = {row.text for row in train}
    for name, part in (("train", train), ("valid", valid)):
        write_manifest(args.out / f"{name}.jsonl", part)
        hours = sum(row.audio.seconds() for row in part) / 3600
        print(f"{name}: {len({row.speaker for row in part})} speakers, {len(part)} utterances, {hours:.2f} h")
    met = sum(row.text in sentences for row in valid)
    print(f"{met} of the utterances set aside say a sentence that occurs in train")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
