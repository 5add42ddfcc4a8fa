"""What a live session costs in words and in time, against the same recordings transcribed as a whole.

Recordings are joined with silence between them and fed at the pace of speech: a piece is there once its last sample
would be, or once the session is done with the piece before, and whatever came meanwhile is fed with it. The clock is
that of the audio, plus the time of computing: the process's own on one thread, so that what else runs counts for
nothing. Prints a JSON line for each right context:

- `wer_whole`: of the recordings, each transcribed by itself; `wer_finals`: of the finals;
- `wer_partials`: of what is shown of each segment when all of it has been read, what right context is about. (For this
  alone segments end 1.2 s after their speech, or they would end before that.)
- `first_partial_s`: from the beginning of speech; `final_s`: from its end;
- `word_s`: from the end of a word until it is shown for good, median and 90 %; words end by their share of the letters;
  `stable_word_s`: until it is stable;
- `words_changed`: shown words that the next text has otherwise or not at all, over the words of the finals;
- `stable_changed`: the same of words that were called stable, which the final alone can change;
- `real_time_factor`: computing over audio.

Before, it checks that finals are what transcription makes of the same samples, and the same in pieces of another size.
With --minutes, instead: the memory of the process after so many minutes of audio, over that after one.

python bench/live.py [--adapter output/quickstart/rwkv-adapter-522.pth] [--minutes 60]
"""

import argparse
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from itertools import chain, cycle, pairwise, repeat
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from torch import Tensor

from rwkv_speech import SpeechRWKV
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.live import Final, Live, Partial
from rwkv_speech.mission_file import best_mission_file
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.endpoint import MARGIN
from rwkv_speech.speech.voice import FRAME

ROOT = Path(__file__).parents[1]
TINY = ROOT / "demo" / "tiny"
BESIDE = MARGIN * FRAME / SAMPLE_RATE  # s of silence at both ends of a segment
PIECE = 320  # samples, 20 ms
SILENCE = 1.6  # s between recordings
LATE = 1.2  # s of silence that end a segment, where its last partial is to have heard all of it
MOST_GROWTH = 5e6  # bytes

Shown = list[tuple[float, Partial | Final]]  # seconds since the session began, and what came then


def spoken(live: Live, audio: Tensor) -> tuple[Shown, float]:
    """What a session shows of audio at its own pace, and the seconds of computing."""
    shown: Shown = []
    clock, place, busy = 0.0, 0, 0.0
    while place < len(audio):
        count = max(PIECE, int(clock * SAMPLE_RATE) - place)
        piece = audio[place : place + count]
        place += len(piece)
        began = time.process_time()
        events = live.feed(piece)
        took = time.process_time() - began
        clock, busy = max(clock, place / SAMPLE_RATE) + took, busy + took
        shown += [(clock, event) for event in events]
    return shown + [(clock, event) for event in live.finish()], busy


def segments(shown: Shown) -> list[Shown]:
    """Each with its final as the last one."""
    found: list[Shown] = [[]]
    for item in shown:
        found[-1].append(item)
        if isinstance(item[1], Final):
            found.append([])
    return found[:-1]


def shown_text(event: Partial | Final) -> str:
    return event.text


def stable_text(event: Partial | Final) -> str:
    return event.stable if isinstance(event, Partial) else event.text


def word_ends(final: Final) -> list[float]:
    """When each word of a segment ends, in seconds; the margins beside speech are left out."""
    start, end = final.start + BESIDE, final.end - BESIDE
    letters = np.cumsum([len(word) + 1 for word in final.text.split()])
    return [start + (end - start) * float(share) for share in letters / letters[-1:]]


def word_delays(segment: Shown, texts: Callable[[Partial | Final], str]) -> list[float]:
    """How long after its end each word of the final was in the texts of events, and stayed."""
    final = segment[-1][1]
    delays = []
    for place, (word, end) in enumerate(zip(final.text.split(), word_ends(final), strict=True)):
        since = segment[-1][0]
        for clock, event in reversed(segment):
            if texts(event).split()[place : place + 1] != [word]:
                break
            since = clock
        delays.append(since - end)
    return delays


def changed(segment: Shown, texts: Callable[[Partial | Final], str]) -> int:
    """Words of the text of each event that the next one doesn't have in their place."""
    pairs = pairwise(texts(event).split() for _, event in segment)
    return sum(word != there for old, new in pairs for word, there in zip(old, chain(new, repeat(None)), strict=False))


def wer(references: list[str], texts: list[str]) -> float:
    """In percent."""
    return round(100 * jiwer.wer(references, texts), 1)


def measure(model: SpeechRWKV, audio: Tensor, references: list[str], **how: Any) -> dict[str, Any]:
    shown, busy = spoken(model.live(**how), audio)
    found = segments(shown)
    ends = [segment[-1] for segment in found]
    finals = [final for _, final in ends]
    late = segments(spoken(model.live(**how, pause=LATE), audio)[0])
    partials = [next((event.text for _, event in reversed(segment[:-1])), "") for segment in late]
    words = sum(len(final.text.split()) for final in finals)
    firsts = [segment[0][0] - segment[-1][1].start - BESIDE for segment in found]
    delays = {
        name: np.quantile([delay for segment in found for delay in word_delays(segment, texts)], [0.5, 0.9])
        for name, texts in (("word_s", shown_text), ("stable_word_s", stable_text))
    }
    return {
        "wer_finals": wer([" ".join(references)], [" ".join(final.text for final in finals)]),
        "wer_partials": wer([" ".join(references)], [" ".join(partials)]),
        "first_partial_s": round(float(np.median(firsts)), 2),
        **{name: [round(float(x), 2) for x in both] for name, both in delays.items()},
        "final_s": round(float(np.median([clock - final.end + BESIDE for clock, final in ends])), 2),
        "words_changed": round(sum(changed(segment, shown_text) for segment in found) / words, 3),
        "stable_changed": round(sum(changed(segment, stable_text) for segment in found) / words, 3),
        "real_time_factor": round(busy / (len(audio) / SAMPLE_RATE), 3),
    }


def check(model: SpeechRWKV, audio: Tensor, **how: Any) -> None:
    """Finals are what transcription makes of their samples, and don't depend on the pieces."""
    finals = []
    for size in (PIECE, 7_001, len(audio)):
        live = model.live(**how)
        events = [event for piece in audio.split(size) for event in live.feed(piece)] + live.finish()
        finals.append([event for event in events if isinstance(event, Final)])
    if finals[0] != finals[1] or finals[0] != finals[2]:
        raise SystemExit("finals depend on the size of the pieces; nothing was measured")
    for final in finals[0]:
        samples = audio[round(final.start * SAMPLE_RATE) : round(final.end * SAMPLE_RATE)]
        if model.transcribe([samples], max_audio_s=how["max_audio_s"]) != [final.text]:
            raise SystemExit(f"{final} is not what transcription makes of it; nothing was measured")


def memory(model: SpeechRWKV, audio: Tensor, minutes: float, **how: Any) -> dict[str, Any]:
    """Resident bytes of the process, after one minute of audio and at most from there on."""
    live, resident, read = model.live(**how), [], 0.0
    began = time.process_time()
    for piece in cycle(audio.split(SAMPLE_RATE // 2)):
        live.feed(piece)
        read += len(piece) / SAMPLE_RATE
        if read >= 60 * (len(resident) + 1):
            resident.append(int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
        if read >= 60 * minutes:
            break
    growth = resident[-1] - resident[0]
    return {
        "minutes": minutes,
        "mb_after_1": round(resident[0] / 1e6, 1),
        "mb_at_the_end": round(resident[-1] / 1e6, 1),
        "mb_at_most": round(max(resident) / 1e6, 1),
        "bound_mb": MOST_GROWTH / 1e6,
        "within_bound": growth <= MOST_GROWTH,
        "seconds": round(time.process_time() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load_model", type=Path, default=TINY / "rwkv6-tiny.pth")
    parser.add_argument("--encoder", default=str(TINY / "wavlm-tiny"))
    parser.add_argument("--adapter", type=Path, help="mission file (default: the best of the quick-start)")
    parser.add_argument("--manifest", type=Path, default=TINY / "corpus" / "test.jsonl")
    parser.add_argument("--recordings", type=int, default=40, help="of the manifest (default: %(default)s)")
    parser.add_argument("--right", type=float, nargs="+", default=[0.0, 0.32, 0.64], help="s (default: %(default)s)")
    parser.add_argument("--step", type=float, default=0.32, help="s (default: %(default)s)")
    parser.add_argument("--left", type=float, help="s (default: the encoder's)")
    parser.add_argument("--max_audio_s", type=float, default=15.0, help="longest segment (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="measure memory over so many minutes of audio, at least 2")
    args = parser.parse_args()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    adapter = args.adapter or best_mission_file(ROOT / "output" / "quickstart")[0]
    model = SpeechRWKV.from_pretrained(args.load_model, encoder=args.encoder, adapter=adapter)
    rows = read_manifest(args.manifest)[: args.recordings]
    waves, references = [row.audio.waveform() for row in rows], [row.text for row in rows]
    silence = torch.zeros(round(SILENCE * SAMPLE_RATE))
    audio = torch.cat([silence, *(part for wave in waves for part in (wave, silence))])
    how = {"step": args.step, "left": args.left, "max_audio_s": args.max_audio_s}
    line = {"bench": "live", "encoder": Path(args.encoder).name, "recordings": len(rows)}
    line["audio_s"] = round(len(audio) / SAMPLE_RATE, 1)
    if args.minutes:
        print(json.dumps(line | memory(model, audio, args.minutes, **how)))
        return
    check(model, audio[: 40 * SAMPLE_RATE], **how)
    whole = wer(references, [model.transcribe([wave], max_audio_s=args.max_audio_s)[0] for wave in waves])
    for right in args.right:
        measured = measure(model, audio, references, right=right, **how)
        print(json.dumps(line | {"right_s": right, "wer_whole": whole} | measured), flush=True)


if __name__ == "__main__":
    sys.exit(main())
