"""A Whisper checkpoint that hears windows of fewer than 30 s, for short recordings: the same weights, less silence.

    python demo/recipes/shorten_whisper.py --encoder openai/whisper-tiny.en --seconds 10 --out whisper-10s

The positions beyond the window are cut off; nothing else is touched. Whatever is longer than the window goes through in
pieces, so choose one that holds nearly all recordings.
"""

import argparse
import sys
from pathlib import Path

import torch

from rwkv_speech.errors import UserError
from rwkv_speech.speech.encoder import import_transformers, quiet

POSITIONS = 50  # of the encoder, per second


def shorten(encoder: str, seconds: int, out: Path) -> None:
    """Writes the shortened checkpoint, with its decoder, and its feature extractor.

    Raises:
        UserError: it can't be loaded, is no Whisper, or its window isn't longer; or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists: choose another --out, or remove it")
    transformers = import_transformers()
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(encoder)
            if config.model_type != "whisper":
                raise UserError(f"{encoder} is a {config.model_type}: only Whisper has a window to shorten")
            model = transformers.WhisperForConditionalGeneration.from_pretrained(encoder, dtype="auto")
            extractor = transformers.AutoFeatureExtractor.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        raise UserError(f"{encoder}: {str(error).splitlines()[0]}") from error
    positions = POSITIONS * seconds
    if not 0 < positions < config.max_source_positions:
        raise UserError(
            f"--seconds {seconds}: expected at least 1, and less than {config.max_source_positions // POSITIONS}"
        )
    embedding = model.model.encoder.embed_positions
    embedding.weight = torch.nn.Parameter(embedding.weight[:positions].clone(), requires_grad=False)
    embedding.num_embeddings = model.config.max_source_positions = positions
    shorter = type(extractor)(**extractor.to_dict() | {"chunk_length": seconds})
    unfinished = out.with_name(f"{out.name}.partial")
    with quiet():
        model.save_pretrained(unfinished)
        shorter.save_pretrained(unfinished)
    unfinished.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="Hugging Face name or folder of a Whisper")
    parser.add_argument("--seconds", type=int, default=10, help="the window (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    shorten(args.encoder, args.seconds, args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
