"""Throughput of the server at 16 clients over that at 1, with three missions. One JSON line.

A model of random weights, the small encoder of demo/tiny and its sentences; each answer has the same number of tokens.
Clients send one recording after another, each to one of the missions; the texts must be those of `transcribe`.

python bench/serve.py [--clients 16] [--requests 48] [--tokens 60] [--n_layer 12] [--n_embd 768]
"""

import argparse
import http.client
import json
import logging
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import uvicorn

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.random_model import write_model
from rwkv_speech import SpeechRWKV
from rwkv_speech.lm.initialise import official_sizes
from rwkv_speech.options import DecodingOptions, ServingOptions
from rwkv_speech.serve.app import make_app

ROOT = Path(__file__).parents[1]
MISSIONS = ["transcribe", "transcribe/second", "translate"]
BOUND = 4.0  # asked of 16 clients over one, on two cores
FORM = '--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n{}\r\n--x\r\n{}; name="file"; filename="a"\r\n\r\n'


def ask(port: int, path: Path, mission: str) -> str:
    body = FORM.format(mission, "Content-Disposition: form-data").encode() + path.read_bytes() + b"\r\n--x--\r\n"
    connection = http.client.HTTPConnection("127.0.0.1", port)
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/v1/audio/transcriptions", body, kind)
    text = json.loads(connection.getresponse().read())["text"]
    connection.close()
    return text


def random_missions(args: argparse.Namespace) -> SpeechRWKV:
    sizes = official_sizes(generation=7, n_layer=args.n_layer, n_embd=args.n_embd)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pth")
        write_model(file, sizes, dtype=torch.float32, seed=0)
        torch.manual_seed(0)
        encoder = str(ROOT / "demo/tiny/wavlm-tiny")
        model = SpeechRWKV.from_pretrained(file, encoder=encoder, mission=MISSIONS, adapter_hidden=512)
    model.language_model.head.weight[0] = 0  # no answer ends before its limit
    for state in model.language_model.time_states:
        torch.nn.init.normal_(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("clients", 16), ("requests", 48), ("tokens", 60), ("n_layer", 12), ("n_embd", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
    model = random_missions(args)
    options = DecodingOptions(max_new_tokens=args.tokens)
    server = uvicorn.Server(
        uvicorn.Config(make_app(model, ServingOptions(), options=options), port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    paths = sorted((ROOT / "demo/tiny/corpus/test").glob("*.ogg"))
    jobs = [(paths[i % len(paths)], MISSIONS[i % len(MISSIONS)]) for i in range(args.requests)]
    wanted = [model.transcribe([path], mission=mission, **vars(options))[0] for path, mission in jobs[:6]]
    rates = {}
    for clients, part in ((1, jobs[: max(6, len(jobs) // 4)]), (args.clients, jobs)):
        with ThreadPoolExecutor(clients) as pool:
            start = time.perf_counter()
            texts = list(pool.map(lambda job: ask(port, *job), part))
            rates[clients] = len(part) / (time.perf_counter() - start)
        if texts[: len(wanted)] != wanted:
            raise SystemExit(f"{clients} clients got other texts than transcribe gives; nothing is reported")
    server.should_exit = True
    thread.join()
    ratio = rates[args.clients] / rates[1]
    found = {"requests_per_s": {str(n): round(rate, 3) for n, rate in rates.items()}, "ratio": round(ratio, 2)}
    print(json.dumps({"bench": "serve"} | vars(args) | found | {"threads": torch.get_num_threads(), "bound": BOUND}))


if __name__ == "__main__":
    main()
