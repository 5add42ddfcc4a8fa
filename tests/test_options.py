"""The flags of train.py: the published recipe as defaults, one line for each mistake, help that is complete."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rwkv_speech.errors import UserError
from rwkv_speech.options import Options

ROOT = Path(__file__).parents[1]


def parse(line: str) -> Options:
    return Options.parse(["--load_model", "m.pth", *line.split()])


def train_py(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = os.environ | {"COLUMNS": "1000"}  # help without line breaks
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def help_of() -> dict[str, str]:
    """The help of each flag, on one line."""
    done = train_py("--help")
    assert done.returncode == 0
    listed = " ".join(done.stdout.partition("\noptions:")[2].split())
    _, *parts = re.split(r"(?:^| )--(\w+) ", listed)
    return dict(zip(parts[::2], parts[1::2], strict=True))


# --- defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    {
        "op": "train",
        "train_type": "state",
        "data": "librispeech",
        "micro_bsz": 4,
        "accumulate_grad_batches": 1,
        "lr_init": 1e-4,
        "lr_final": None,
        "warmup_steps": 100,
        "beta1": 0.9,
        "beta2": 0.99,
        "adam_eps": 1e-8,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "epoch_steps": 0,
        "grad_cp": 0,
        "num_nodes": 1,
        "accelerator": "auto",
        "on_bad_audio": "stop",
        "beam": 1,
        "proj_dir": "output",
    }.items(),
)
def test_default(flag, value):
    assert getattr(parse(""), flag) == value


@pytest.mark.parametrize(
    "flag",
    ["encoder", "adapter", "downsample_k", "adapter_hidden", "n_layer", "n_embd", "precision", "strategy", "devices"],
)
def test_what_the_program_decides_is_none(flag):
    assert getattr(parse(""), flag) is None


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("downsample_k", "5"),
        ("adapter_hidden", "2048"),
        ("encoder", "microsoft/wavlm-large"),
        ("lr_init", "0.0001"),
        ("micro_bsz", "4"),
        ("grad_cp", "0"),
        ("epoch_steps", "0"),
        ("devices", "4 GPUs"),
        ("precision", "bf16"),
        ("strategy", "deepspeed_stage_1"),
        ("eval_split", "test-clean+test-other"),
    ],
)
def test_help_names_the_default(help_of, flag, value):
    assert value in help_of[flag].partition("default")[2]


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_holds_every_flag(help_of):
    assert set(help_of) == {f.name for f in fields(Options)} | {"help"}
    assert all(re.search("[a-z]{3}", text) for text in help_of.values())


def test_help_shows_values_of_this_program_not_of_python(help_of):
    for name, text in help_of.items():
        assert not re.search(r"None|MISSING|==|True|False|<", text), name
        assert text.count("(default") <= 1, name


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "flag", "value"),
    [
        ("--devices 2", "devices", 2),
        ("--devices 0,3", "devices", [0, 3]),
        ("--devices 3,", "devices", [3]),
        ("--lr_init 3e-5", "lr_init", 3e-5),
        ("--grad_cp 1", "grad_cp", 1),
        ("--download", "download", True),
        ("--op predict --file_path a.wav b.wav", "file_path", ["a.wav", "b.wav"]),
        ("--proj_dir=--odd", "proj_dir", "--odd"),
    ],
)
def test_value(line, flag, value):
    assert getattr(parse(line), flag) == value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--micro_bs 4", ["--micro_bs"]),  # nor does an abbreviation pass
        ("--no_such_flag", ["--no_such_flag"]),
        ("stray.wav", ["stray.wav"]),
        ("--op transcribe", ["--op", "transcribe", "predict"]),
        ("--precision int8", ["--precision", "int8", "bf16"]),
        ("--train_type lora", ["--train_type", "lora", "state"]),
        ("--micro_bsz 0", ["--micro_bsz", "0", "positive"]),
        ("--micro_bsz four", ["--micro_bsz", "four"]),
        ("--epoch_steps -1", ["--epoch_steps", "-1", "negative"]),
        ("--lr_init 0", ["--lr_init", "positive"]),
        ("--lr_final=-1e-4", ["--lr_final", "positive"]),
        ("--lr_init nan", ["--lr_init", "nan"]),
        ("--devices 0", ["--devices", "0"]),
        ("--devices ,", ["--devices"]),
        ("--op predict", ["--op predict", "--file_path"]),
        ("--op eval --file_path a.wav", ["--file_path", "--op predict", "eval"]),
        ("--accelerator cpu --devices 0,1", ["--accelerator", "cpu", "--devices"]),
    ],
)
def test_mistake(line, words):
    with pytest.raises(UserError) as raised:
        parse(line)
    message = str(raised.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def test_the_model_is_required():
    with pytest.raises(UserError, match="--load_model"):
        Options.parse([])


def test_made_in_python_they_are_checked_the_same_way():
    with pytest.raises(UserError, match="--file_path"):
        Options(load_model="m.pth", op="predict")


@pytest.mark.parametrize("arguments", [["--load_model", "m", "--no_such_flag"], []], ids=["unknown", "no-model"])
def test_the_program_says_a_mistake_in_one_line(arguments):
    done = train_py(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train\.py: [^\n]+\n", done.stderr)
    assert "--help" in done.stderr
