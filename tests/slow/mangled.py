"""A thousand mangled files of every sort through prediction, training, evaluation and caching.

    python tests/slow/mangled.py [--count 1000] [--seed 0]

Audio (cut, bits flipped, headers that lie, playlists, pipes, sockets), manifests and tables, weight files, mission
files and encoder folders are made from the seed, and each is given to every operation that can meet it. Prints one
JSON line: cases, runs, problems (a traceback, more than 20 s, a file that was neither used nor named ...), the slowest
run in seconds and the largest memory in GB.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.mangling import try_all


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="takes everything that is made, and keeps it")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # of this process, which reads some of the same
    began = time.monotonic()
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        trial = try_all(Path(folder), count=args.count, seed=args.seed, every_operation=True)
    found = {
        "cases": trial.cases,
        "runs": trial.runs,
        "used": trial.used,
        "named": trial.named,
        "refused": trial.refused,
        "problems": len(trial.problems),
        "slowest_s": round(trial.slowest, 1),
        "memory_gb": round(trial.peak / 1e9, 2),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(found))
    return int(bool(trial.problems))


if __name__ == "__main__":
    sys.exit(main())
