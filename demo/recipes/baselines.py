"""What else the frozen frames give: an adapter that spells by itself (CTC) and, of Whisper, its own decoder.

Writes hypotheses in the form of an evaluation's; what is there already isn't computed again.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, count, groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rwkv_speech.data.sample import Row
from rwkv_speech.data.sources import load_split
from rwkv_speech.errors import UserError
from rwkv_speech.missions import get_mission
from rwkv_speech.scoring import RecordWriter
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.encoder import import_transformers
from rwkv_speech.speech.frame_cache import FrameCache

BLANK = "_"  # CTC's, the first of the letters
BATCH, LEARNING_RATE, SEED = 16, 2e-3, 1
K, HIDDEN = 2, 1024
WHISPER_BATCH = 8
WHISPER_WORDS = 50_000  # tokens of text in every vocabulary of Whisper


class Probe(NamedTuple):
    """An adapter from frames to letters in place of embeddings."""

    letters: str
    adapter: Adapter


def new_probe(letters: str, width: int) -> Probe:
    return Probe(letters, Adapter(width, len(letters), downsample_k=K, hidden=HIDDEN))


def train_probe(frames: Sequence[Tensor], texts: Sequence[str], steps: int) -> Probe:
    """A probe for frames (F, width) and the letters of all texts, trained by CTC."""
    torch.manual_seed(SEED)
    letters = BLANK + "".join(sorted(set().union(*texts) - {BLANK}))
    probe = new_probe(letters, frames[0].shape[1])
    optimizer = torch.optim.AdamW(probe.adapter.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    targets = [torch.tensor([letters.index(c) for c in text if c != BLANK]) for text in texts]
    batches = chain.from_iterable(torch.randperm(len(frames)).split(BATCH) for _ in count())
    for chosen in islice(batches, steps):
        heard = pad_sequence([frames[i].float() for i in chosen], True)
        said = [targets[i] for i in chosen]
        logits, lengths = probe.adapter(heard, torch.tensor([len(frames[i]) for i in chosen]))
        log_probs = logits.log_softmax(-1).transpose(0, 1)
        counts = torch.tensor([len(text) for text in said])
        loss = F.ctc_loss(log_probs, torch.cat(said), lengths, counts, zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe


@torch.no_grad()
def spell(probe: Probe, frames: Tensor) -> str:
    """The most likely letter of each position, repetitions merged, blanks dropped."""
    logits, _ = probe.adapter(frames.float()[None], torch.tensor([len(frames)]))
    best = logits[0].argmax(dim=1).tolist()
    return " ".join("".join(probe.letters[i] for i, _ in groupby(best) if i).split())


def probe_texts(cache: FrameCache, train: Sequence[Row], test: Sequence[Row], steps: int, file: Path) -> list[str]:
    """What a probe spells that has learnt, or learns now, from the frames of other rows.

    file: keeps the probe.
    """
    if file.exists():
        kept = torch.load(file, weights_only=True)
        probe = new_probe(kept["letters"], kept["width"])
        probe.adapter.load_state_dict(kept["weights"])
    else:
        cache.fill([row.audio for row in train])
        frames = [cache.read(row.audio)[0].half() for row in train]
        probe, width = train_probe(frames, [row.text.lower() for row in train], steps), frames[0].shape[1]
        kept = {"letters": probe.letters, "width": width, "weights": probe.adapter.state_dict()}
        torch.save(kept, temporary := file.with_suffix(".tmp"))
        temporary.replace(file)
    cache.fill([row.audio for row in test])
    return [spell(probe, cache.read(row.audio)[0]) for row in test]


@torch.no_grad()
def whisper_texts(name: str, rows: Sequence[Row], task: str | None = None) -> list[str]:
    """What Whisper's own decoder writes, greedily.

    task: "transcribe" or "translate", of a multilingual one, which is told the language of each row.
    """
    transformers = import_transformers()
    model = transformers.WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(name)
    decode, token = _whisper_vocabulary(name)
    texts = []
    for at in range(0, len(rows), WHISPER_BATCH):
        some = rows[at : at + WHISPER_BATCH]
        waveforms = [row.audio.waveform().numpy() for row in some]
        features = extractor(waveforms, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        begin = {}
        if task:
            words = [("startoftranscript", row.language, task, "notimestamps") for row in some]
            begin["decoder_input_ids"] = torch.tensor([[token(f"<|{word}|>") for word in row] for row in words])
        # By the longest of the batch, more than is said in it: what it writes about silence goes on to any bound.
        most = 20 + 10 * max(map(len, waveforms)) // SAMPLE_RATE
        tokens = model.generate(features, do_sample=False, max_new_tokens=min(200, most), **begin)
        texts += [decode(ids) for ids in tokens.tolist()]
    return texts


def _whisper_vocabulary(name: str) -> tuple[Callable[[list[int]], str], Callable[[str], int]]:
    """Tokens -> text, and a special token -> its id: by the checkpoint's own files or, where it has none, by the
    package openai-whisper."""
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(name)
        if len(tokenizer) > WHISPER_WORDS:  # without files there may still be a tokenizer, of special tokens only
            return partial(tokenizer.decode, skip_special_tokens=True), tokenizer.convert_tokens_to_ids
    except (OSError, ValueError, TypeError):
        pass
    try:
        from whisper.tokenizer import get_tokenizer
    except ImportError as error:
        raise UserError(f"{name} has no tokenizer's files; pip install openai-whisper has one for English") from error
    english = get_tokenizer(multilingual=False)
    return lambda tokens: english.decode([t for t in tokens if t < english.eot]), english.special_tokens.__getitem__


def write(path: Path, rows: Sequence[Row], texts: Sequence[str]) -> None:
    """Records of the mission that the rows name, else of transcripts."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    with RecordWriter(temporary) as writer:
        for row, text in zip(rows, texts, strict=True):
            mission = get_mission(row.mission or "transcribe")
            writer.write(mission.record(row, text.strip(), seconds=row.audio.seconds()))
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--decoder", help="the Whisper that decodes by itself (default: the encoder's)")
    parser.add_argument("--train", required=True, help="what the probe learns from")
    parser.add_argument("--steps", type=int, default=2000, help="of the probe's training (default: %(default)s)")
    parser.add_argument("--test", required=True)
    parser.add_argument("--cache", required=True, help="folder of cached frames")
    parser.add_argument("--probe", type=Path, required=True, help="file of the trained probe")
    parser.add_argument("--out", type=Path, required=True, help="folder for the hypotheses")
    args = parser.parse_args()
    cache = FrameCache(args.cache, storage="fp16")
    cache.encoder(args.encoder)
    test = _load(args.test)

    if not (args.out / "ctc-probe.jsonl").exists():
        train = load_split(args.train)
        write(args.out / "ctc-probe.jsonl", test, probe_texts(cache, train, test, args.steps, args.probe))
    decoder = args.decoder or args.encoder
    config = import_transformers().AutoConfig.from_pretrained(decoder)
    if config.model_type == "whisper" and not (args.out / "whisper-decoder.jsonl").exists():
        write(args.out / "whisper-decoder.jsonl", test, whisper_texts(decoder, test))


def _load(split: str) -> list[Row]:
    return load_split(None, data_dir=split) if Path(split).is_dir() else load_split(split)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
