"""What the quick-start needs beside the program: a mission file from before any training, and the table at the end."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rwkv_speech import SpeechRWKV
from rwkv_speech.mission_file import best_mission_file, write_mission_file


def write_untrained(args: argparse.Namespace) -> None:
    """The adapter as torch makes it, and states of zero."""
    torch.manual_seed(args.random_seed)
    sizes = {"downsample_k": args.downsample_k, "adapter_hidden": args.adapter_hidden}
    model = SpeechRWKV.from_pretrained(args.load_model, encoder=args.encoder, **sizes)
    write_mission_file(args.folder / "rwkv-adapter-0.pth", model.trainable_state_dict(), model.describe())


def results(args: argparse.Namespace) -> Table:
    """Word error rates before and after, and what was trained and what not."""
    folder, (mission, _) = args.folder, best_mission_file(args.folder)
    model = SpeechRWKV.from_pretrained(args.load_model, encoder=args.encoder, adapter=mission)
    table = Table(title="Synthetic speech; sentences that no part has met before", title_justify="left")
    table.add_column()
    table.add_column("before training", justify="right")
    table.add_column("after", justify="right")
    rates = [word_error_rate(path / "eval" / "summary.json") for path in (folder / "untrained", folder)]
    table.add_row("WER (95 % interval)", *rates)
    table.add_row("trained: adapter, state", "", parameters(model.trainable_state_dict().values()))
    for name, part in (("language model", model.language_model), ("speech encoder", model.speech_encoder)):
        table.add_row(f"frozen: {name}", "", parameters(p for p in part.parameters() if not p.requires_grad))
    table.add_row("all of it took", "", f"{args.seconds / 60:.1f} min")
    table.caption = f"{folder}: training.png, eval/report.html, {mission.name}"
    return table


def parameters(tensors: Iterable[Tensor]) -> str:
    return f"{sum(x.numel() for x in tensors):,} parameters"


def word_error_rate(summary: Path) -> str:
    (split,) = json.loads(summary.read_text())["splits"].values()
    low, high = split["raw"]["wer_interval"]
    return f"{split['raw']['wer']:.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load_model", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    what = parser.add_subparsers(dest="what", required=True)
    untrained = what.add_parser("untrained")
    for name in ("downsample_k", "adapter_hidden", "random_seed"):
        untrained.add_argument(f"--{name}", type=int, required=True)
    what.add_parser("table").add_argument("--seconds", type=float, required=True, help="since the quick-start began")
    args = parser.parse_args()
    if args.what == "untrained":
        write_untrained(args)
    else:
        Console(stderr=True).print(results(args))


if __name__ == "__main__":
    main()
