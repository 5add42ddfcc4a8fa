"""Sets speakers of a folder in LibriSpeech's layout aside: train.jsonl and valid.jsonl share no speaker.

Sentences may occur in both; how many do is said here, and they are reported separately in the end.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from manifests import write_manifest

from rwkv_speech.data.sample import Row
from rwkv_speech.data.sources import load_split
from rwkv_speech.errors import UserError

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held_out", type=float, default=0.2)
    args = parser.parse_args()
    train, valid = split_speakers(load_split(None, data_dir=args.data_dir), args.held_out)
    sentences = {row.text for row in train}
    for name, part in (("train", train), ("valid", valid)):
        part = [replace(row, audio=replace(row.audio, duration=row.audio.seconds())) for row in part]
        write_manifest(args.out / f"{name}.jsonl", part)
        hours = sum(row.audio.duration for row in part) / 3600
        print(f"{name}: {len({row.speaker for row in part})} speakers, {len(part)} utterances, {hours:.2f} h")
    met = sum(row.text in sentences for row in valid)
    print(f"{met} of the utterances set aside say a sentence that occurs in train")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
