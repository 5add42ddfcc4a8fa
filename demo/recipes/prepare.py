"""Manifests of a corpus as it is published: train.jsonl, valid.jsonl and test.jsonl, and the lines that use them.

    python demo/recipes/prepare.py CORPUS FOLDER OUT

What the folder must hold, for each corpus, stands in corpora.py.
"""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

from corpora import CORPORA
from manifests import write_manifest

from rwkv_speech.errors import UserError

LAUNCHER = "sh demo/demo-state-tuning.sh"


def prepare(corpus: str, folder: Path, out: Path) -> dict[str, Path]:
    """Writes the manifests of the splits that are there.

    Raises:
        UserError: a file or all of the audio is missing.
    """
    folder = Path(os.path.abspath(folder.expanduser()))  # its name tells the language
    try:
        splits = {name: rows for name, rows in CORPORA[corpus](folder, out).items() if rows}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; expected {corpus} in {folder}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: not as {corpus} is published ({error!r}); see demo/recipes/corpora.py") from error
    if not splits:
        raise UserError(f"{folder}: nothing of {corpus} there; see demo/recipes/corpora.py for what is expected")
    for name, rows in splits.items():
        if not rows[0].audio.source.exists():
            raise UserError(f"{rows[0].audio.source}: no such file; unpack the corpus's archives of audio")
        write_manifest(out / f"{name}.jsonl", rows)
        seconds = [row.audio.duration for row in rows]
        hours = "" if None in seconds else f", {sum(seconds) / 3600:.2f} h"
        speakers = len({row.speaker for row in rows} - {None})
        print(f"{name}: {len(rows)} rows{f', {speakers} speakers' if speakers else ''}{hours}")
    return {name: out / f"{name}.jsonl" for name in splits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=["librispeech", *CORPORA])
    parser.add_argument("folder", type=Path, help="the corpus, unpacked")
    parser.add_argument("out", type=Path, help="folder to write the manifests to; of librispeech none are written")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if args.corpus == "librispeech":  # read as it is
        where = f"data_dir={shlex.quote(str(args.folder))}"
        train, test = f"{where} valid_split=dev-clean", where
    else:
        files = {name: shlex.quote(str(path)) for name, path in prepare(args.corpus, args.folder, args.out).items()}
        valid = f" valid_split={files['valid']}" if "valid" in files else ""
        train = f"train_split={files['train']}{valid}" if "train" in files else ""
        test = f"eval_split={files['test']}" if "test" in files else ""
    print("\nTrain and evaluate, each as one line:\n")
    if train:
        print(f"load_model=RWKV.pth {train} {LAUNCHER}")
    if test:
        print(f"OP=eval load_model=RWKV.pth {test} {LAUNCHER}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
