"""A thousand mangled files of every sort through prediction, training, evaluation and caching.

    python tests/slow/mangled.py [--count 1000] [--seed 0]

Audio (cut, bits flipped, headers that lie, playlists, pipes, sockets), manifests and tables, weight files, mission
files and encoder folders are made from the seed, and each is given to every operation that can meet it. A problem is a
traceback, an exit status or a last line that says nothing, more than 20 s or 2.5 GB, code of a weight file that ran, a
recording that was neither used nor named, was both, or is used by one operation and refused by another. What was used
is what training steps got, evaluation has records of, prediction printed and the cache has frames of.

A line for each problem comes at once. At the end one JSON line: cases, runs, recordings used and named, runs refused,
problems, the slowest run in seconds and the largest memory in GB. A thousand cases are some 2,250 runs, a quarter of an
hour on an idle core.

Last result (2026-11-27): 1,000 cases, seed 0, 2,241 runs in 11.5 minutes beside another job: 2,791 recordings used,
6,246 named, 1,669 runs refused, 0 problems, at most 5.0 s and 1.18 GB.
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
