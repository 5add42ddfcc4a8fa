"""The settings of train.py: the published recipe as defaults, one line for each mistake, help that is complete."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rwkv_speech.errors import UserError
from rwkv_speech.options import GROUPS, Options, TrainingOptions, environment_flags, setting_fields

ROOT = Path(__file__).parents[1]
SETTINGS = {f.name: group for group, f in setting_fields()}


def parse(line: str) -> Options:
    return Options.parse(["--load_model", "m.pth", *line.split()])


def value(line: str, name: str) -> object:
    return parse(line).flat()[name]


def train_py(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = os.environ | {"COLUMNS": "1000"}  # help without line breaks
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def help_by_group() -> dict[str, dict[str, str]]:
    """Group -> flag -> its help, on one line."""
    done = train_py("--help")
    assert done.returncode == 0
    _, *parts = re.split(r"^(\w+):$", done.stdout, flags=re.MULTILINE)
    found = {}
    for group, listed in zip(parts[::2], parts[1::2], strict=True):
        _, *flags = re.split(r"(?:^| )--(\w+) ", " ".join(listed.split()))
        found[group] = dict(zip(flags[::2], flags[1::2], strict=True))
    return found


@pytest.fixture(scope="module")
def help_of(help_by_group) -> dict[str, str]:
    return {flag: text for group in help_by_group.values() for flag, text in group.items()}


# --- defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    {
        "op": "train",
        "train_type": "adapter+state",
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
        "temperature": 0.0,
        "top_p": 1.0,
        "sampling_seed": 0,
        "proj_dir": "output",
    }.items(),
)
def test_default(flag, value):
    assert parse("").flat()[flag] == value


@pytest.mark.parametrize(
    "flag",
    [
        *("encoder", "adapter", "mission", "downsample_k", "adapter_hidden", "n_layer", "n_embd"),
        *("precision", "strategy", "devices"),
    ],
)
def test_what_the_program_decides_is_none(flag):
    assert parse("").flat()[flag] is None


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("downsample_k", "5"),
        ("adapter_hidden", "2048"),
        ("encoder", "microsoft/wavlm-large"),
        ("mission", "transcribe"),
        ("temperature", "0.0"),
        ("top_p", "1.0"),
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
    assert set(help_of) == {*SETTINGS, "help", "from_environment"}
    assert all(re.search("[a-z]{3}", text) for text in help_of.values())


def test_help_lists_flags_by_group(help_by_group):
    listed = {flag: group for group, flags in help_by_group.items() for flag in flags}
    assert listed == {name: group or "run" for name, group in SETTINGS.items()} | {
        "help": "options",
        "from_environment": "run",
    }
    some = ("op", "load_model", "train_split", "lr_init", "beam", "devices")
    assert [listed[name] for name in some] == ["run", "model", "data", "training", "decoding", "machine"]


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
        ("--mission translate", "mission", "translate"),
        ("--temperature 0.7 --top_p 0.9", "top_p", 0.9),
        ("--temperature 0.7 --sampling_seed 3", "sampling_seed", 3),
        ("--noise_dir x --noise_snr 5,20", "noise_snr", [5.0, 20.0]),
        ("--early_stop 3 --op eval", "early_stop", 3),
    ],
)
def test_value(line, flag, value):
    assert parse(line).flat()[flag] == value


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainingOptions(lr_init=1e-5),
        lambda: Options.of(load_model="m.pth", lr_init=1e-5).training,
        lambda: parse("--lr_init 1e-5").training,
        lambda: Options.parse(["--load_model=m", "--from_environment"], {"lr_init": "1e-5", "lr_final": ""}).training,
    ],
    ids=["group", "flat", "flags", "environment"],
)
def test_a_learning_rate_alone_is_held(make):
    options = make()
    assert [options.lr_init * options.lr_factor(step, 1000) for step in (100, 500, 999)] == [1e-5] * 3
    assert options.largest_lr(1000, 1000) == 1e-5


def test_the_largest_learning_rate_by_hand():
    """0.2, 0.4, 0.6, 0.8, 1 times lr_init, then by equal factors to lr_final."""
    falling = TrainingOptions(lr_init=1e-3, lr_final=1e-5, warmup_steps=4)
    assert [falling.largest_lr(n, 20) for n in (1, 3, 5, 20)] == pytest.approx([2e-4, 6e-4, 1e-3, 1e-3])
    rising = TrainingOptions(lr_init=1e-4, lr_final=4e-4, warmup_steps=0)
    assert [rising.largest_lr(n, 101) for n in (1, 51, 101)] == pytest.approx([1e-4, 2e-4, 4e-4])


def test_values_lie_in_groups():
    options = parse("--beam 4 --lr_init 1e-3 --data x.jsonl --devices 2 --eval_bsz 3")
    assert (options.model.load_model, options.data.data, options.training.lr_init) == ("m.pth", "x.jsonl", 1e-3)
    assert (options.decoding.beam, options.machine.devices, options.eval_bsz) == (4, 2, 3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--micro_bs 4", ["--micro_bs"]),  # nor does an abbreviation pass
        ("--no_such_flag", ["--no_such_flag"]),
        ("stray.wav", ["stray.wav"]),
        ("--op transcribe", ["--op", "transcribe", "predict"]),
        ("--precision int8", ["--precision", "int8", "bf16"]),
        ("--train_type lora+lora", ["--train_type", "lora", "state"]),
        ("--micro_bsz 0", ["--micro_bsz", "0", "positive"]),
        ("--micro_bsz four", ["--micro_bsz", "four"]),
        ("--epoch_steps -1", ["--epoch_steps", "-1", "negative"]),
        ("--lr_init 0", ["--lr_init", "positive"]),
        ("--lr_final=-1e-4", ["--lr_final", "positive"]),
        ("--lr_init nan", ["--lr_init", "nan"]),
        ("--devices 0", ["--devices", "0"]),
        ("--devices ,", ["--devices"]),
        ("--temperature -1", ["--temperature", "-1", "0 or more"]),
        ("--temperature nan", ["--temperature", "nan"]),
        ("--temperature 1 --top_p 0", ["--top_p", "0.0", "more than 0"]),
        ("--temperature 1 --top_p 1.5", ["--top_p", "1.5", "at most 1"]),
        ("--top_p 0.9", ["--top_p", "0.9", "--temperature"]),
        ("--temperature 1 --beam 4", ["--temperature", "--beam", "4"]),
        ("--sampling_seed -1", ["--sampling_seed", "negative"]),
        ("--noise_snr 20,5 --noise_dir x", ["--noise_snr", "20,5", "LOW,HIGH"]),
        ("--noise_snr 5,20", ["--noise_snr", "--noise_dir"]),
        ("--ctc_align_steps 5", ["--ctc_align_steps", "5", "--ctc_align"]),
        ("--early_stop 3", ["--early_stop", "3", "--valid_split"]),
        ("--max_batch_s inf", ["--max_batch_s", "inf", "positive"]),
        ("--max_audio_s 0.5", ["--max_audio_s", "0.5", "at least 1"]),
        ("--cache_features x --noise_dir y", ["--cache_features", "--noise_dir"]),
        ("--op eval --cache_features x", ["--cache_features", "--op train", "eval"]),
        ("--output_dir x", ["--output_dir", "--op predict", "train"]),
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
        Options.of(load_model="m.pth", op="predict")
    with pytest.raises(UserError, match="--temperature"):
        Options.of(load_model="m.pth", temperature=-1.0)


@pytest.mark.parametrize("arguments", [["--load_model", "m", "--no_such_flag"], []], ids=["unknown", "no-model"])
def test_the_program_says_a_mistake_in_one_line(arguments):
    done = train_py(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train\.py: [^\n]+\n", done.stderr)
    assert "--help" in done.stderr


# --- flat names ------------------------------------------------------------------------------------------------------


def test_each_name_stands_once():
    assert set(Counter(f.name for _, f in setting_fields()).values()) == {1}
    assert {*SETTINGS.values()} == {None, *GROUPS}


def test_flat_and_of_are_inverse():
    options = parse("--op predict --file_path a b --beam 4 --noise_dir x --noise_snr 5,20 --devices 0,1 --download")
    assert set(options.flat()) == set(SETTINGS)
    assert Options.of(**options.flat()) == options


def test_of_takes_only_settings():
    with pytest.raises(TypeError, match="no_such"):
        Options.of(load_model="m.pth", no_such=1)
    with pytest.raises(TypeError, match="n_best"):
        Options.of(load_model="m.pth", n_best=1)


def test_what_an_interrupted_training_may_change():
    """What changes nothing in what is learnt: reading, evaluating, decoding, logging, and when to stop."""
    left = parse("").flat(resume_ignored=False)
    assert left.items() <= parse("").flat().items()
    assert SETTINGS.keys() - left.keys() == {
        *("num_workers", "wandb", "wkv", "cuda_graphs", "on_bad_audio", "on_nonfinite"),
        *("valid_split", "valid_steps", "early_stop", "average"),
        *("log_every", "eval_split", "eval_bsz", "perturb", "resume", "max_audio_s", "format"),
        *(name for name, group in SETTINGS.items() if group == "decoding"),
    }


# --- environment -----------------------------------------------------------------------------------------------------


def from_environment(line: str, **environment: str) -> dict[str, object]:
    return Options.parse(["--from_environment", *line.split()], environment).flat()


def test_the_environment_is_read_only_when_asked(monkeypatch):
    monkeypatch.setenv("beam", "4")
    assert value("", "beam") == 1
    assert value("--from_environment", "beam") == 4


def test_flags_win_over_the_environment():
    found = from_environment(
        "--beam 2 --op predict --file_path a b", load_model="m", beam="3", op="eval", file_path="c"
    )
    assert (found["load_model"], found["beam"], found["op"], found["file_path"]) == ("m", 2, "predict", ["a", "b"])


def test_every_setting_is_taken_from_the_environment():
    values = {name: f"the {name}" for name in SETTINGS}
    switches = {f.name for _, f in setting_fields() if f.default is False}
    assert {"download", "loop_guard", "resume"} <= switches
    for op, others in {
        "train": {"file_path", "output_dir", "prompt", "records", "normalizer", "to"},
        "predict": {"cache_features", "records", "normalizer", "to"},
        "score": {"cache_features", "file_path", "prompt", "to"},
        "export": {"cache_features", "file_path", "prompt", "records", "normalizer"},
    }.items():
        names = {name for name, group in SETTINGS.items() if group not in ("live", "serving")} - {"op", *others}
        wanted = {f"--{name}" if name in switches else f"--{name}={values[name]}" for name in names}
        assert set(environment_flags(op, values)) == wanted


def test_empty_is_not_given():
    assert from_environment("", load_model="m", beam="", download="", lr_final="") == parse("--load_model m").flat()


@pytest.mark.parametrize(("said", "found"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_switches_in_the_environment(said, found):
    assert from_environment("", load_model="m", download=said)["download"] is found


def test_a_mistake_in_the_environment_is_one_line():
    with pytest.raises(UserError, match=r"--micro_bsz.*four") as raised:
        from_environment("", load_model="m", micro_bsz="four")
    assert "\n" not in str(raised.value)
