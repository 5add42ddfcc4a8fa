"""Runs the parts of bench/gpu.sh, each in a process of its own with a time limit, and prints one table at the end.

Parts of a phase run side by side: what is timed has the machine for itself. Nothing here needs more than Python.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The most important first; the numbers are limits in seconds.
PHASES = (
    {"build": 100},
    {"operator": 110, "operator7": 110, "sanitizer": 120, "whole": 90, "training": 120, "commands": 110}
    | {"warm-step": 120, "warm-decode": 120},  # compiled now, so that nothing timed waits for it
    {"wkv": 50},
    {"step": 140},
    {"decode": 110},
    {"quantised": 90},
    {"quickstart": 150},
    {"fla": 240},
)
GRACE = 5.0  # from TERM to KILL, and from KILL to giving a process up
LEAST = 15.0  # less time is not worth starting a part in
NO_GPU = 3  # exit status of the part `build`
SLOW = 4  # a dry run is no race: limits are so many times longer


def environment(program: Path, work: Path) -> dict[str, str]:
    """Of every part: the program needs no installation, no network and no home folder that can be written to."""
    site = work / "site"
    path = [site, ROOT, program / "src", *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "FLA_CACHE_RESULTS": "0",  # fla's kernels are tuned again where nothing else runs
    }
    env.setdefault("OMP_NUM_THREADS", "2")  # several parts run at once
    home = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError:
        caches = ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME")
        env |= {name: str(work / "cache" / name.lower()) for name in (*caches, "MPLCONFIGDIR", "HOME")}
    try:
        importlib.metadata.version("rwkv-speech")
    except importlib.metadata.PackageNotFoundError:  # mission files tell the version of what wrote them
        info = site / "rwkv_speech-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rwkv-speech\nVersion: 0\n")
    return env


class Part:
    """One process of a part, its limit, and its output in a file."""

    def __init__(self, name: str, limit: float, work: Path, flags: list[str], env: dict[str, str]) -> None:
        self.name, self.limit, self.began = name, limit, time.monotonic()
        self.log = work / f"{name}.log"
        command = [sys.executable, "-m", "bench.gpu.run", name, *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def finished(self) -> dict | None:
        """What became of it, or None while it runs; at its limit it is stopped."""
        status = self.process.poll()
        seconds = time.monotonic() - self.began
        if status is None and seconds < self.limit:
            return None
        line = {"part": self.name, "status": "done", "seconds": round(seconds, 1)}
        if status is None:
            self.stop()
            line["status"] = "timed out"
        elif status:
            line["status"], line["exit"] = "failed", status
        if line["status"] != "done":
            line["last lines"] = self.log.read_text(errors="replace").strip().splitlines()[-5:]
        return line

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)  # with all that it has started
                self.process.wait(GRACE)
            except (ProcessLookupError, subprocess.TimeoutExpired):  # a process may hang in the driver for good
                continue


def run(args: argparse.Namespace, out: Path, work: Path) -> list[dict]:
    """All phases; the lines of the results."""
    results = out / "results.jsonl"
    results.write_text("")
    end = time.monotonic() + args.seconds * (SLOW if args.dry else 1)
    env = environment(args.program, work)
    flags = ["--results", str(results), "--work", str(work), "--program", str(args.program), *["--dry"] * args.dry]
    running: list[Part] = []

    def lines() -> list[dict]:
        return [json.loads(line) for line in results.read_text().splitlines()]

    def tell(line: dict) -> None:
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{line['part']}: {line['status']}", file=sys.stderr, flush=True)

    try:
        for phase in PHASES:
            for name, limit in phase.items():
                if name not in args.parts:
                    continue
                limit = min(limit * (SLOW if args.dry else 1), end - time.monotonic())
                if limit < LEAST:
                    tell({"part": name, "status": "skipped", "reason": f"{args.seconds:g} s are over"})
                else:
                    running.append(Part(name, limit, work, flags, env))
            while running:
                time.sleep(0.05)
                for part in [*running]:
                    if line := part.finished():
                        running.remove(part)
                        tell(line)
                        if line.get("exit") == NO_GPU and part.name == "build":
                            return lines()
            if "build" in phase and not any(line.get("backend") in ("cuda", "cpu") for line in lines()):
                flags += ["--wkv", "torch"]  # it would not be built in the other parts either
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        for part in running:
            part.stop()
        logs = sorted(work.glob("*.log"))
        text = "".join(f"== {path.stem}\n{path.read_text(errors='replace')}\n" for path in logs)
        (out / "log.txt").write_text(text)
    return lines()


def table(lines: list[dict]) -> str:
    """A line for each part with what became of it, and below it what it found; `detail` stays in the file."""
    rows = []
    for part in dict.fromkeys(line["part"] for line in lines):
        own = [line for line in lines if line["part"] == part]
        status = next((line for line in own if "status" in line), {"status": "stopped"})
        rest = {k: v for k, v in status.items() if k not in ("part", "status", "seconds", "last lines")}
        rows.append(f"{part}: {status['status']}, {status.get('seconds', 0):g} s {written(rest)}".rstrip())
        rows += [f"    | {line}" for line in status.get("last lines", [])]
        for line in own:
            if "what" in line and (not line.get("detail") or line.get("ok") is False):
                mark = {True: "+", False: "-"}.get(line.get("ok"), " ")
                known = ("part", "what", "ok", "detail")
                rest = {k: v for k, v in line.items() if k not in known and v is not None}
                rows.append(f"  {mark} {line['what']}: {written(rest)}")
    return "\n".join(rows)


def written(values: dict) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--out", type=Path, help="folder for results.jsonl, table.txt and log.txt (default: build/gpu)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use in this run")
    parser.add_argument("--parts", type=lambda text: text.split(","), help="only these, as in build,wkv")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--program", type=Path, default=ROOT, help="the tree to measure")
    args = parser.parse_args(arguments)
    known = [name for phase in PHASES for name in phase]
    if unknown := set(args.parts or ()) - set(known):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if args.wheels and not args.wheels.is_dir():
        parser.error(f"--wheels {args.wheels}: no such folder")
    args.parts = args.parts or [name for name in known if not (args.dry and name.startswith("warm-"))]
    args.program = args.program.resolve()
    out = (args.out or ROOT / "build" / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the results so far are still told
    with tempfile.TemporaryDirectory(prefix="rwkv-gpu-", ignore_cleanup_errors=True) as work:
        for wheel in args.wheels.glob("*.whl") if args.wheels else ():  # for this run only: nothing is installed
            zipfile.ZipFile(wheel).extractall(Path(work) / "site")
        lines = run(args, out, Path(work))
    text = table(lines)
    (out / "table.txt").write_text(text + "\n")
    print(text)
    bad = [line for line in lines if line.get("ok") is False or line.get("status") in ("failed", "timed out")]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
