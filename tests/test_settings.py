"""Options of training, decoding and machine change what they say: by flags, against values from elsewhere."""

import importlib.util
import json
import math
import shutil

import pytest
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.strategies import DDPStrategy

from rwkv_speech.engine.machine import fit_to_machine
from rwkv_speech.engine.runs import Run, StopRequest
from rwkv_speech.engine.trainer import make_trainer
from rwkv_speech.errors import UserError
from rwkv_speech.lm import graphs, wkv
from rwkv_speech.lm.rwkv6 import TimeMix
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import Options
from rwkv_speech.speech.audio import load_audio
from tests.tiny import at_door, do, last, losses, missions

pytestmark = pytest.mark.usefixtures("voiced")

# The options of the optimiser, none at its default, and what they are by default.
OPTIMISER = {
    **{"lr_init": (2e-3, 1e-4), "lr_final": (5e-4, 2e-3), "warmup_steps": (1, 100), "state_lr_scale": (7.0, 1.0)},
    **{"beta1": (0.7, 0.9), "beta2": (0.8, 0.99), "adam_eps": (1e-3, 1e-8), "weight_decay": (0.3, 0.0)},
    **{"grad_clip": (0.5, 1.0)},
}


def adamw_by_hand(model, waveforms, texts, options):
    """What three steps change, by Loshchilov and Hutter 2019 (algorithm 2), after clipping their norm."""
    parameters = model.trainable_state_dict()
    before = {name: x.detach().clone() for name, x in parameters.items()}
    first, second = ({name: torch.zeros_like(x) for name, x in before.items()} for _ in range(2))
    beta1, beta2, warmup = options["beta1"], options["beta2"], options["warmup_steps"]
    for t in (1, 2, 3):
        rate = options["lr_init"] * (0.2 + 0.8 * (t - 1) / max(1, warmup))
        if t > warmup:
            share = (t - 1 - warmup) / max(1, 2 - warmup)
            rate = options["lr_init"] ** (1 - share) * options["lr_final"] ** share
        gradients = torch.autograd.grad(model.loss(waveforms, texts), [*parameters.values()])
        norm = sum(g.square().sum() for g in gradients).sqrt()
        for (name, x), g in zip(parameters.items(), gradients, strict=True):
            g = g * min(1.0, options["grad_clip"] / norm)
            state = "time_state" in name
            step = rate * (options["state_lr_scale"] if state else 1)
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g * g
            direction = first[name] / (1 - beta1**t) / ((second[name] / (1 - beta2**t)).sqrt() + options["adam_eps"])
            decay = options["weight_decay"] if not state and x.dim() == 2 else 0.0
            with torch.no_grad():
                x -= step * (direction + decay * x)
    change = torch.cat([(x.detach() - before[name]).flatten() for name, x in parameters.items()])
    with torch.no_grad():
        for name, x in parameters.items():
            x.copy_(before[name])
    return change


def test_three_steps_are_those_of_adamw_by_hand(world, tmp_path):
    model = world.speech_rwkv(adapter_hidden=32)
    utterances = world.utterances[:4]
    lines = [json.dumps({"audio": str(path), "text": text}) for path, text in utterances]
    (tmp_path / "four.jsonl").write_text("\n".join(lines))
    start = tmp_path / "start.pth"
    torch.save({name: x.detach() for name, x in model.trainable_state_dict().items()}, start)
    flags = [f"--{name}={value}" for name, (value, _) in OPTIMISER.items()]
    do("train", world, tmp_path / "out", *flags, f"--adapter={start}", f"--data={tmp_path / 'four.jsonl'}")
    before = torch.load(start, weights_only=True)
    found = torch.cat([(x - before[name]).flatten() for name, x in last(tmp_path / "out").items()])

    waveforms, texts = [load_audio(path) for path, _ in utterances], [text for _, text in utterances]
    given = {name: value for name, (value, _) in OPTIMISER.items()}

    def distance(options):
        expected = adamw_by_hand(model, waveforms, texts, options)
        return ((found - expected).norm() / expected.norm()).item()

    assert distance(given) < 1e-3
    for name, (_, default) in OPTIMISER.items():
        assert distance(given | {name: default}) > 1e-2, name


def test_files_are_written_as_often_as_asked(world, tmp_path):
    """6 steps to an epoch: every 5 steps, after every second epoch, and at the end."""
    do("train", world, tmp_path, "--epoch_count=3", "--epoch_save=2", "--save_steps=5", "--average=9")
    steps = [info["step"] for name, (_, info) in missions(tmp_path).items() if "avg" not in name]
    assert sorted(steps) == [5, 10, 12, 15, 18]


def test_checkpointing_computes_each_layer_twice(world, tmp_path, monkeypatch):
    calls = []
    forward = TimeMix.forward
    monkeypatch.setattr(TimeMix, "forward", lambda self, *a, **how: calls.append(1) or forward(self, *a, **how))
    for value, expected in ((0, 2), (1, 4)):  # of two layers
        calls.clear()
        do("train", world, tmp_path / str(value), "--epoch_count=1", "--epoch_steps=1", f"--grad_cp={value}")
        assert len(calls) == expected


def test_compiled_steps_are_the_steps(world, tmp_path, monkeypatch, caplog):
    """One compilation serves for both layers and batches of other lengths."""
    caplog.set_level("INFO", "rwkv_speech")
    made, compile_ = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward  # what was traced, and soon done

    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, **how | {"backend": backend}))
    flags = ["--epoch_count=1", "--epoch_steps=3", "--grad_cp=1"]
    assert do("train", world, tmp_path / "plain", *flags) == 0
    assert not made
    assert do("train", world, tmp_path / "compiled", *flags, "--compile") == 0
    assert len(made) == 1
    assert "blocks are compiled" in caplog.text
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_compiling_says_what_it_lacks(world, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--compile goes with --quant none"):
        do("train", world, tmp_path, "--compile", "--quant=nf4")
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler, and there is no no-such-compiler"):
        do("train", world, tmp_path, "--compile")


def test_tokens_are_read_as_graphs_or_one_by_one(world, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(graphs, "_has_graphs", lambda x: True)
    monkeypatch.setattr(graphs, "_record", lambda run, device: made.append(1) or run() or run)
    assert do("train", world, tmp_path, "--epoch_count=1", "--epoch_steps=1") == 0
    assert do("eval", world, tmp_path, "--max_new_tokens=3", "--cuda_graphs=0") == 0
    assert not made
    shutil.rmtree(tmp_path / "eval")
    assert do("eval", world, tmp_path, "--max_new_tokens=3") == 0
    assert made


def test_precision_and_operator_are_those_asked_for(world, tmp_path, caplog):
    caplog.set_level("INFO", "rwkv_speech")
    flags = ["--epoch_count=1", "--epoch_steps=1"]
    found = {}
    for precision in ("fp32", "bf16", "tf32"):
        do("train", world, tmp_path / precision, *flags, f"--precision={precision}", "--wkv=torch")
        assert wkv.backend("cpu").name == "torch"
        assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        assert f", {precision}, strategy" in caplog.text
        found[precision] = losses(tmp_path / precision)[1]
    assert 0 < abs(found["bf16"] / found["fp32"] - 1) < 0.01
    do("train", world, tmp_path / "cpu", *flags, "--wkv=cpu")
    assert wkv.backend("cpu").name == "cpu"
    assert torch.get_float32_matmul_precision() == "highest"


def test_processes_of_several_machines_are_counted(world, tmp_path, caplog):
    caplog.set_level("INFO", "rwkv_speech")
    options = Options.parse([*world.flags, f"--proj_dir={tmp_path}", "--num_nodes=3", "--devices=2", "--strategy=ddp"])
    machine = fit_to_machine(options.machine)
    assert "computing on 6 x CPU" in caplog.text
    trainer = make_trainer(options, machine, Run(1, tmp_path, {}, ""), [], StopRequest(), {})
    assert (trainer.num_nodes, trainer.world_size) == (3, 6)
    assert isinstance(trainer.strategy, DDPStrategy)


def test_losses_go_to_wandb(world, tmp_path, monkeypatch):
    logged, made = [], []

    class Recorder(DummyLogger):
        def __init__(self, **how):
            super().__init__()
            made.append(how)

        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics["loss"]))

    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match="--wandb needs the package wandb"):
            do("train", world, tmp_path, "--wandb=speech", "--epoch_count=1")
    monkeypatch.setattr("rwkv_speech.engine.trainer.WandbLogger", Recorder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    do("train", world, tmp_path, "--wandb=speech", "--epoch_count=1", "--lr_init=2e-3")
    (how,) = made
    assert (how["project"], how["config"]["lr_init"]) == ("speech", 2e-3)
    assert dict(logged) == pytest.approx(losses(tmp_path))


@pytest.fixture(scope="module")
def chatter(world, tmp_path_factory):
    """A language model that says a, b or c with 0.5, 0.3 and 0.2, whatever came before; flags of a prediction by it."""
    folder = tmp_path_factory.mktemp("chatter")
    weights = torch.load(world.model, weights_only=True)
    weights["ln_out.weight"].zero_()
    weights["ln_out.bias"].zero_()[0] = 1
    weights["head.weight"][:, 0] = -30
    for letter, share in zip("abc", (0.5, 0.3, 0.2), strict=True):
        weights["head.weight"][ord(letter) + 1, 0] = math.log(share)
    torch.save(weights, folder / "model.pth")
    model = SpeechRWKV.from_pretrained(folder / "model.pth", encoder=world.encoder, adapter_hidden=32)
    torch.save({name: x.detach() for name, x in model.trainable_state_dict().items()}, folder / "m.pth")
    flags = [flag for flag in world.flags if not flag.startswith(("--data", "--load_model"))]
    flags += [f"--load_model={folder / 'model.pth'}", f"--adapter={folder / 'm.pth'}", "--max_new_tokens=300"]
    return [*flags, "--op=predict", "--file_path", world.utterances[0][0]]


@pytest.mark.parametrize(
    ("flags", "shares"),
    [
        pytest.param(["--temperature=1"], (0.5, 0.3, 0.2), id="as-it-says"),
        pytest.param(["--temperature=0.5"], (25 / 38, 9 / 38, 4 / 38), id="squared"),
        pytest.param(["--temperature=1", "--top_p=0.7"], (5 / 8, 3 / 8, 0), id="the-two-likeliest"),
        pytest.param([], (1, 0, 0), id="the-likeliest"),
    ],
)
def test_letters_are_drawn_as_asked(chatter, monkeypatch, capsys, flags, shares):
    """300 draws: three standard deviations are at most 0.087."""
    status, printed = at_door(monkeypatch, capsys, *flags, *chatter)
    text = printed.out.strip()
    assert (status, len(text)) == (0, 300)
    for letter, share in zip("abc", shares, strict=True):
        assert text.count(letter) / 300 == (share if share in (0, 1) else pytest.approx(share, abs=0.087))


def test_other_draws_and_shorter_answers(chatter, monkeypatch, capsys):
    def said(*flags):
        return at_door(monkeypatch, capsys, *chatter[:-2], *flags, *chatter[-2:])[1].out.strip()

    draws = [said("--temperature=1", f"--sampling_seed={seed}") for seed in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
    assert said("--max_new_tokens=7") == "a" * 7
    assert said("--loop_guard") == "a", "the first copy of what is repeated"
