"""What the rounds of a conversation cost: the time of the last one over the first, and the sizes of its file.

Every round hears the same recording and answers with one token, since longer answers would end where they like. A
round's time is the median of its CPU time over the conversations. Without --adapter the adapter is random, which costs
the same. Prints one JSON line; the exit status is 1 where the last round takes more than the bound allows.

python bench/conversation.py [--rounds 20] [--conversations 30]
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from rwkv_speech import SpeechRWKV

TINY = Path(__file__).parents[1] / "demo" / "tiny"
BOUND = 1.1  # asked of the last round over the first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load_model", type=Path, default=TINY / "rwkv7-tiny-missions.pth")
    parser.add_argument("--encoder", default=str(TINY / "wavlm-tiny"))
    parser.add_argument("--adapter", type=Path, help="mission file (default: a random adapter)")
    parser.add_argument("--file", type=Path, default=TINY / "corpus" / "test" / "0000.ogg", help="a recording")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--conversations", type=int, default=30)
    args = parser.parse_args()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    how = {"adapter": args.adapter} if args.adapter else {"mission": "converse"}
    model = SpeechRWKV.from_pretrained(args.load_model, encoder=args.encoder, **how)
    "".join(model.conversation().reply(args.file, max_new_tokens=1))  # so that what is made once is not counted
    times: list[list[float]] = [[] for _ in range(args.rounds)]
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.conversations):
            chat = model.conversation()
            for took in times:
                began = time.process_time()
                "".join(chat.reply(args.file, max_new_tokens=1))
                took.append(time.process_time() - began)
                if not number:
                    chat.save(path := Path(folder) / "talk.safetensors")
                    sizes.append(path.stat().st_size)
    first, last = median(times[0]), median(times[-1])
    line = {"bench": "conversation", "rounds": args.rounds, "first_s": round(first, 4), "last_s": round(last, 4)}
    line |= {"last_over_first": round(last / first, 3), "bound": BOUND, "file_bytes": sorted({*sizes})}
    print(json.dumps(line))
    return int(last > BOUND * first)


if __name__ == "__main__":
    sys.exit(main())
