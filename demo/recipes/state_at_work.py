"""What state-at-work.sh needs: manifests of five missions, and the table of accuracies by mission and state."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rwkv_speech import SpeechRWKV
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.mission_file import newest_mission_file, read_mission_file

ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CHINESE = ["零", "一", "二", "三", "四", "五", "六", "七", "八", "九"]
GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
MISSIONS: dict[str, Callable[[int, str], str]] = {
    "english": lambda digit, speaker: ENGLISH[digit],
    "chinese": lambda digit, speaker: CHINESE[digit],
    "next": lambda digit, speaker: ENGLISH[digit + 1],
    "speaker": lambda digit, speaker: speaker,
    "german": lambda digit, speaker: GERMAN[digit],
}
FIFTH = "german"


def recordings(folder: Path) -> Iterator[tuple[str, Path, int, str]]:
    """Split, file, digit and speaker: of `<digit>_<speaker>_<number>.wav`, the official test is number < 5."""
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder")
    folder = folder / "recordings" if (folder / "recordings").is_dir() else folder
    for path in sorted(folder.iterdir()):
        digit, _, rest = path.stem.partition("_")
        speaker, _, number = rest.rpartition("_")
        if path.suffix in (".wav", ".flac") and digit.isdecimal() and number.isdecimal():
            yield "test" if int(number) < 5 else "train", path.absolute(), int(digit), speaker


def write_manifests(folder: Path, out: Path) -> None:
    """`train.jsonl` with four missions, `train-german.jsonl`, and `test-<mission>.jsonl` of each."""
    lines: dict[str, list[str]] = {}
    for split, path, digit, speaker in recordings(folder):
        for name, answer in MISSIONS.items():
            where = f"test-{name}" if split == "test" else f"train-{name}" if name == FIFTH else "train"
            row = {"audio": str(path), "text": answer(digit, speaker), "mission": f"label/{name}"}
            lines.setdefault(where, []).append(json.dumps(row, ensure_ascii=False) + "\n")
    if not lines:
        raise SystemExit(f"{folder}: no recordings named <digit>_<speaker>_<number>.wav or .flac")
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in lines.items():
        (out / f"{name}.jsonl").write_text("".join(rows))


def accuracy(model: SpeechRWKV, manifest: Path) -> float:
    """The share of a manifest's rows whose answer is right."""
    rows, right = read_manifest(manifest), 0
    for start in range(0, len(rows), 50):
        some = rows[start : start + 50]
        results = model.decode(model.prepare([model.sample(row) for row in some]).to(model.device))
        right += sum(model.text(result) == row.text for result, row in zip(results, some, strict=True))
    return right / len(rows)


def print_table(project: Path, load_model: str) -> None:
    """A row for each state, a column for each mission's test recordings, answered from that state."""
    states = {name: newest_mission_file(project / "four" / "label" / name) for name in MISSIONS if name != FIFTH}
    states[FIFTH] = newest_mission_file(project / "fifth")
    zero = {name: newest_mission_file(project / "zero" / "label" / name) for name in MISSIONS if name != FIFTH}
    labels = {name: read_mission_file(path).info["labels"] for name, path in states.items()}
    table = Table("state", *MISSIONS, title="% of the test recordings answered right")
    found = {}
    for state in (*states, "zero"):
        for name in MISSIONS:
            path = states.get(state) or zero.get(name)
            if path is None:
                continue  # the control has four missions
            model = SpeechRWKV.from_pretrained(load_model, adapter=path, mission=f"label/{name}")
            model.task().labels = labels[name]
            found[state, name] = accuracy(model, project / "data" / f"test-{name}.jsonl")
        cells = (f"{100 * found[state, name]:.1f}" if (state, name) in found else "" for name in MISSIONS)
        table.add_row("none, adapter alone" if state == "zero" else state, *cells)
    (project / "accuracies.json").write_text(
        json.dumps({f"{state}, {name}": share for (state, name), share in found.items()}, indent=2) + "\n"
    )
    Console().print(table)
    tensors = read_mission_file(states[FIFTH]).tensors
    sizes = [sum(x.nbytes for name, x in tensors.items() if (part in name)) for part in ("time_state", "adapter")]
    print(f"a state is {sizes[0] / 1000:.0f} kB, the adapter {sizes[1] / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("manifests", "newest", "table"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--load_model")
    args = parser.parse_args()
    if args.what == "manifests":
        write_manifests(*args.folders)
    elif args.what == "newest":
        print(newest_mission_file(*args.folders))
    else:
        print_table(*args.folders, args.load_model)


if __name__ == "__main__":
    main()
