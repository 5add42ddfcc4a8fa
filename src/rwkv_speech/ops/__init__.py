"""What the program does: train, eval, predict, chat, live, serve, score, export. Each gives the exit status."""

from collections.abc import Callable

from rwkv_speech.ops.chat import chat
from rwkv_speech.ops.evaluate import evaluate
from rwkv_speech.ops.export import export
from rwkv_speech.ops.live import live
from rwkv_speech.ops.predict import predict
from rwkv_speech.ops.score import score
from rwkv_speech.ops.serve import serve
from rwkv_speech.ops.train import train
from rwkv_speech.options import Options

OPS: dict[str, Callable[[Options], int]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "chat": chat,
    "live": live,
    "serve": serve,
    "score": score,
    "export": export,
}
