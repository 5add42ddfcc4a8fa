"""Mission files: the published form, what doesn't fit, writing without a moment of half a file."""

import json
import os
import pickle
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_speech.errors import UserError
from rwkv_speech.mission_file import (
    MissionFileError,
    best_mission_file,
    newest_mission_file,
    read_best_mission_files,
    read_mission_file,
    write_mission_file,
)

# The world's encoder has width 32, its language model 2 layers of width 64 in heads of 32.
PUBLISHED = {
    "language_model.blocks.0.att.time_state": (2, 32, 32),
    "language_model.blocks.1.att.time_state": (2, 32, 32),
    "speech_encoder.adapter.0.weight": (24, 5 * 32),
    "speech_encoder.adapter.0.bias": (24,),
    "speech_encoder.adapter.2.weight": (64, 24),
    "speech_encoder.adapter.2.bias": (64,),
}
STATES, (FIRST, FIRST_BIAS, SECOND, SECOND_BIAS) = list(PUBLISHED)[:2], list(PUBLISHED)[2:]


def tensors(dtype=torch.float32, **shapes):
    """A published file's content; `shapes` change or add some, by name, and None leaves one out."""
    generator = torch.Generator().manual_seed(0)
    wanted = {name: shape for name, shape in (PUBLISHED | shapes).items() if shape is not None}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in wanted.items()}


def save(folder, content, info=None):
    path = folder / "rwkv-adapter-7.pth"
    torch.save(content, path)
    if info is not None:
        path.with_suffix(".json").write_text(json.dumps(info))
    return path


def refusal(action, *arguments, **how):
    """The message of the error, one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **how)
    assert isinstance(caught.value, MissionFileError)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_a_file_of_published_names_alone_loads(world, tmp_path, dtype):
    published = tensors(dtype)
    path = save(tmp_path, published)
    model = world.speech_rwkv(adapter=path, dtype=torch.bfloat16)
    assert model.adapter.downsample_k == 5
    blocks, layers = model.language_model.blocks, model.adapter.layers
    inside = [*(block.att.time_state for block in blocks)]
    inside += [layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias]
    for (name, there), here in zip(published.items(), inside, strict=True):
        assert here.dtype == torch.float32, name
        assert torch.equal(here, there.float()), name
    assert len(model.transcribe([torch.zeros(16000)], max_new_tokens=3)) == 1


@pytest.mark.parametrize(
    ("k", "info", "flags"),
    [
        pytest.param(3, None, {}, id="by-tensors"),
        pytest.param(3, None, {"downsample_k": 3}, id="by-flag"),
        pytest.param(3, {"downsample_k": 3}, {}, id="by-json"),
        pytest.param(3, {"downsample_k": 3}, {"downsample_k": 3, "adapter_hidden": 24}, id="by-all"),
    ],
)
def test_k_is_told_by_tensors_flag_or_json(world, tmp_path, k, info, flags):
    path = save(tmp_path, tensors(**{FIRST: (24, k * 32)}), info)
    assert world.speech_rwkv(adapter=path, **flags).adapter.downsample_k == k


def test_the_json_file_tells_the_encoder(world, tmp_path):
    path = save(tmp_path, tensors(), {"encoder": world.encoder})
    assert world.speech_rwkv(adapter=path, encoder=None).speech_encoder.name == world.encoder


@pytest.mark.parametrize(
    ("shapes", "info", "flags", "said"),
    [
        pytest.param(
            {"language_model.blocks.2.att.time_state": (2, 32, 32)}, None, {}, ("3 layers", "2 x 64"), id="layers"
        ),
        pytest.param({SECOND: (128, 24), SECOND_BIAS: (128,)}, None, {}, ("width 128", "2 x 64"), id="width"),
        pytest.param(dict.fromkeys(STATES, (1, 64, 64)), None, {}, ("(1, 64, 64)", "(2, 32, 32)"), id="heads"),
        pytest.param({FIRST: (24, 150)}, None, {}, ("150", "width 32"), id="k-by-tensors"),
        pytest.param({}, None, {"downsample_k": 4}, ("160", "--downsample_k", "K = 4", "width 32"), id="k-by-flag"),
        pytest.param({}, {"downsample_k": 4}, {}, ("160", "JSON", "K = 4", "width 32"), id="k-by-json"),
        pytest.param({}, None, {"adapter_hidden": 48}, ("24 hidden", "--adapter_hidden is 48"), id="hidden"),
        pytest.param(
            dict.fromkeys(STATES, (1, 64, 64)) | {FIRST: (24, 150), SECOND: (128, 24), SECOND_BIAS: (128,)},
            None,
            {"adapter_hidden": 48},
            ("(1, 64, 64)", "width 128", "150", "48"),
            id="all-in-one-error",
        ),
    ],
)
def test_what_does_not_fit_is_one_error_naming_both_sides(world, tmp_path, shapes, info, flags, said):
    path = save(tmp_path, tensors(**shapes), info)
    message = refusal(world.speech_rwkv, adapter=path, **flags)
    assert str(path) in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        # The first three would be copied without an error, stretched over what is there.
        pytest.param({STATES[1]: (1, 32, 32)}, (STATES[1], "(1, 32, 32)", "(2, 32, 32)"), id="one-state"),
        pytest.param({FIRST_BIAS: (1,)}, (FIRST_BIAS, "(1,)", "(24,)"), id="bias"),
        pytest.param({STATES[0]: (32, 32)}, (STATES[0], "(32, 32)"), id="state-of-two-dimensions"),
        pytest.param({SECOND: (64, 25)}, (SECOND, "(64, 25)", "(64, 24)"), id="layers-do-not-meet"),
        pytest.param({FIRST: (24,)}, (FIRST, "(24,)"), id="matrix-of-one-dimension"),
        pytest.param({SECOND: ()}, (SECOND, "()"), id="matrix-of-no-dimension"),
        pytest.param({STATES[0]: None}, ("missing", STATES[0]), id="gap-in-the-layers"),
        pytest.param({SECOND_BIAS: None}, ("missing", SECOND_BIAS), id="missing"),
        pytest.param({"emb.weight": (8, 8)}, ("unknown", "emb.weight"), id="another-model"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, shapes, said):
    path = save(tmp_path, tensors(**shapes))
    message = refusal(read_mission_file, path)
    assert str(path) in message
    for part in said:
        assert part in message


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickled_object_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "sprung"
    for content in (tensors() | {FIRST: Trap(trap)}, Trap(trap)):
        message = refusal(read_mission_file, save(tmp_path, content))
        assert "rwkv-adapter-7.pth" in message
        assert "weights_only" not in message
        assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap))).close()
    assert trap.exists(), "the case is void: the trap doesn't work"


@pytest.mark.parametrize("content", [[], {"a": 1}, {3: torch.zeros(1)}, torch.zeros(3)], ids=str)
def test_other_content_is_refused(tmp_path, content):
    refusal(read_mission_file, save(tmp_path, content))


def test_no_file_an_empty_one_a_truncated_one_and_a_bad_json(tmp_path):
    assert "does not exist" in refusal(read_mission_file, tmp_path / "rwkv-adapter-1.pth")
    assert "is a folder" in refusal(read_mission_file, tmp_path)
    path = save(tmp_path, tensors())
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert str(path) in refusal(read_mission_file, path)
    path.write_bytes(whole)
    for info in (
        '{"downsample_k": ',
        "[" * 100_000,
        "[]",
        '{"encoder": 3}',
        '{"downsample_k": "5"}',
        '{"labels": [1]}',
    ):
        path.with_suffix(".json").write_text(info)
        assert "rwkv-adapter-7.json" in refusal(read_mission_file, path)


def test_a_mission_that_is_not_known_is_named_with_its_file(world, tmp_path):
    path = tmp_path / "rwkv-adapter-7.pth"
    model = world.speech_rwkv(adapter=None)
    write_mission_file(path, model.trainable_state_dict(), {"mission": "sing"})
    with pytest.raises(UserError, match=r"rwkv-adapter-7\.pth names the mission 'sing', which is not known here"):
        world.speech_rwkv(adapter=path)
    assert world.speech_rwkv(adapter=path, mission="answer").task().name == "answer"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    content = tensors()
    content[STATES[1]][1, 2, 3] = value
    assert f"{STATES[1]} holds NaN or infinite numbers" in refusal(read_mission_file, save(tmp_path, content))


# --- states alone, as RWKV-PEFT saves them ---


@pytest.fixture
def states(tmp_path):
    """Names and shape of RWKV-PEFT's own: `{n: p for n, p in state_dict.items() if "time_state" in n}`."""
    content = {f"blocks.{i}.att.time_state": torch.full((2, 32, 32), i + 1.0).bfloat16() for i in range(2)}
    torch.save(content, tmp_path / "rwkv-3-state.pth")
    return tmp_path / "rwkv-3-state.pth"


def test_states_alone_are_no_mission_file_and_it_says_so(states):
    message = refusal(read_mission_file, states)
    assert "initial states without an adapter" in message
    assert "--load_state" in message


def test_states_alone_replace_those_of_the_mission_file(world, tmp_path, states):
    published = tensors()
    model = world.speech_rwkv(adapter=save(tmp_path, published), load_state=states)
    assert [x.unique().tolist() for x in model.language_model.time_states] == [[1.0], [2.0]]
    assert torch.equal(model.adapter.layers[0].weight, published[FIRST])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.1.att.time_state": None}, "blocks.1.att.time_state is missing; expected .* of 2 layers"),
        ({"blocks.2.att.time_state": (2, 32, 32)}, r"blocks.2.att.time_state is \(2, 32, 32\); expected"),
        ({"blocks.0.att.time_state": (1, 64, 64)}, r"is \(1, 64, 64\); expected .* \(2, 32, 32\)"),
        ({"emb.weight": (8, 8)}, "emb.weight"),
    ],
    ids=["too-few", "too-many", "heads", "a-model"],
)
def test_states_of_another_model_are_refused(world, states, change, said):
    content = torch.load(states)
    for name, shape in change.items():
        content.pop(name, None)
        if shape:
            content[name] = torch.zeros(shape)
    torch.save(content, states)
    assert re.search(said, refusal(world.speech_rwkv, load_state=states))


# --- the encoder that a mission file names ---


def test_a_folder_is_kept_with_where_and_what_it_is(world, tmp_path, monkeypatch, caplog):
    """`encoder=enc` of one working directory, used from another, moved, and changed."""
    shutil.copytree(world.encoder, tmp_path / "enc")
    monkeypatch.chdir(tmp_path)
    model = world.speech_rwkv(encoder="enc", adapter_hidden=24)
    path = tmp_path / "rwkv-adapter-3.pth"
    write_mission_file(path, model.trainable_state_dict(), model.describe())
    assert json.loads(path.with_suffix(".json").read_text())["encoder"] == str(tmp_path / "enc")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert world.speech_rwkv(adapter=path, encoder=None).speech_encoder.name == str(tmp_path / "enc")
    shutil.move(tmp_path / "enc", tmp_path / "moved")
    message = refusal(world.speech_rwkv, adapter=path, encoder=None)
    assert f"the encoder {tmp_path / 'enc'}, which is no folder here" in message
    world.speech_rwkv(adapter=path, encoder="../moved")
    assert not caplog.records

    weights = tmp_path / "moved/model.safetensors"
    other = {name: x + 1 for name, x in load_file(weights).items()}
    save_file(other, weights, metadata={"format": "pt"})
    world.speech_rwkv(adapter=path, encoder="../moved")
    assert f"was trained with the encoder {tmp_path / 'enc'}, not ../moved" in caplog.text
    shutil.move(tmp_path / "moved", tmp_path / "enc")
    world.speech_rwkv(adapter=path, encoder=None)
    assert f"another encoder than the one that {tmp_path / 'enc'} holds now" in caplog.text


def test_a_name_of_the_hub_is_said_before_it_is_fetched(world, tmp_path, caplog):
    caplog.set_level("INFO", "rwkv_speech")
    asked = []

    def fetch(name, **_):
        asked.extend(caplog.messages)
        raise UserError("stop here")

    path = save(tmp_path, tensors(), {"encoder": "somebody/else"})
    with pytest.raises(UserError, match="stop here"):
        world.speech_rwkv(adapter=path, encoder=None, load_encoder=fetch)
    assert asked == [f"{path} asks for the encoder somebody/else from the Hugging Face hub"]


def test_one_word_is_never_asked_of_the_hub(world, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_speech.speech.hub.hub_is_reachable", lambda: pytest.fail("the hub is asked"))
    path = save(tmp_path, tensors(), {"encoder": "enc"})
    assert "the encoder enc, which is no folder here" in refusal(world.speech_rwkv, adapter=path, encoder=None)
    with pytest.raises(UserError, match="speech encoder enc: no such folder"):
        world.speech_rwkv(encoder="enc")


def test_what_is_written_is_the_published_form(world, tmp_path):
    model = world.speech_rwkv(adapter_hidden=24)
    path = tmp_path / "new" / "rwkv-adapter-3.pth"
    write_mission_file(path, model.trainable_state_dict(), model.describe(step=3))
    content = torch.load(path, weights_only=True)
    assert type(content) is dict
    assert {name: tuple(x.shape) for name, x in content.items()} == PUBLISHED
    assert all(type(x) is torch.Tensor and x.dtype == torch.float32 for x in content.values())
    info = json.loads(path.with_suffix(".json").read_text())
    assert info["encoder"] == world.encoder
    expected = {"downsample_k": 5, "encoder_width": 32, "adapter_hidden": 24, "n_layer": 2, "n_embd": 64, "step": 3}
    assert info.items() >= expected.items()
    assert sorted(p.name for p in path.parent.iterdir()) == ["rwkv-adapter-3.json", "rwkv-adapter-3.pth"]
    again = world.speech_rwkv(adapter=path)
    for name, x in again.trainable_state_dict().items():
        assert torch.equal(x, content[name])


@pytest.mark.parametrize(("module", "name"), [(torch, "save"), (os, "replace")], ids=["save", "rename"])
def test_a_crash_while_writing_leaves_the_old_files(tmp_path, monkeypatch, module, name):
    path = tmp_path / "rwkv-adapter-3.pth"
    write_mission_file(path, tensors(), {"step": "old"})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def crash(content, file):
        if name == "save":
            file.write(b"half") if hasattr(file, "write") else Path(file).write_bytes(b"half")
        raise RuntimeError("power cut")

    monkeypatch.setattr(module, name, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        write_mission_file(path, tensors(), {"step": "new"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("files", "newest"),  # name -> when its run began
    [
        ({"294": "", "300": "", "300-avg2": "", "8": ""}, "300-avg2"),
        ({"20": "", "20-run2": "", "20-run10": "", "20-run2-2": "", "9": ""}, "20-run10"),
        ({"20-avg5": "", "20-avg5-run2": "", "20-run2": ""}, "20-avg5-run2"),
        ({"300": "2026-01-02", "300-avg2": "2026-01-02", "40": "2026-11-01", "9000": ""}, "40"),
        ({"mine": "", "7": ""}, "7"),
        ({"mine": ""}, "mine"),
    ],
    ids=["step-and-kind", "names-taken", "means-of-runs", "later-run", "other-name", "only-other-name"],
)
def test_the_newest_is_told_by_run_step_and_kind_whatever_its_time(tmp_path, files, newest):
    assert "rwkv-adapter-*.pth" in refusal(newest_mission_file, tmp_path)
    assert "train first" in refusal(newest_mission_file, tmp_path / "nowhere")
    for name in ("other.pth", "rwkv-adapter-30.json", ".rwkv-adapter-31.pth.99", "rwkv-adapter-32.pth.tmp"):
        (tmp_path / name).touch()
    for order in (list(files), list(files)[::-1]):
        for when, name in enumerate(order):
            path = tmp_path / f"rwkv-adapter-{name}.pth"
            path.touch()
            os.utime(path, (when, when))
            path.with_suffix(".json").write_text(json.dumps({"run_began": files[name]}) if files[name] else "{")
        assert newest_mission_file(tmp_path).name == f"rwkv-adapter-{newest}.pth"


def test_the_newest_is_read_while_training_writes_and_removes_files(tmp_path):
    """As `MissionFiles` does it: a file is written, then the one before it removed, its weights first."""
    writing = threading.Event()

    def train():
        for step in range(1, 200):
            write_mission_file(tmp_path / f"rwkv-adapter-{step}.pth", content, {"step": step})
            writing.set()
            for suffix in (".pth", ".json"):
                (tmp_path / f"rwkv-adapter-{step - 1}.pth").with_suffix(suffix).unlink(missing_ok=True)

    content = tensors()
    training = threading.Thread(target=train)
    training.start()
    writing.wait()
    steps = []
    while training.is_alive():
        ((file, _),) = read_best_mission_files(tmp_path)
        assert f"rwkv-adapter-{file.info['step']}.pth" == file.path.name
        steps.append(file.info["step"])
    assert steps == sorted(steps)
    assert len(set(steps)) > 5, "the case is void: nothing changed meanwhile"


def test_the_best_is_that_of_the_newest_run(tmp_path):
    """Of the second run, step 20 was better than step 10, and 30 wasn't; the third was never validated."""

    def write(step, run, **info):
        path = tmp_path / f"rwkv-adapter-{step}.pth"
        write_mission_file(path, tensors(), {"step": step, "run": f"r{run}", "run_began": str(run)} | info)
        return path

    write(90, 1, wer=0.1, best_by="wer")
    assert best_mission_file(tmp_path) == (
        tmp_path / "rwkv-adapter-90.pth",
        "the best of its run by validation (wer 0.1)",
    )
    write(10, 2, wer=0.5, best_by="wer")
    write(30, 2, wer=0.4)
    best = write(20, 2, wer=0.3, best_by="wer")
    expected = "the best of its run by validation (wer 0.3); the newest is rwkv-adapter-30.pth"
    assert best_mission_file(tmp_path) == (best, expected)
    ((file, which),) = read_best_mission_files(tmp_path)
    assert (file.path, file.info["wer"], which) == (best, 0.3, expected)
    best.with_suffix(".json").write_text("[")
    assert best_mission_file(tmp_path)[0].name == "rwkv-adapter-10.pth", "a damaged one says nothing"
    assert best_mission_file(write(40, 3, train_loss=1.0).parent) == (tmp_path / "rwkv-adapter-40.pth", "the newest")
    foreign = tmp_path / "published" / "rwkv-adapter-1.pth"
    foreign.parent.mkdir()
    torch.save(tensors(), foreign)
    assert best_mission_file(foreign.parent) == (foreign, "the newest")


def test_json_never_holds_what_is_no_number(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_mission_file(tmp_path / "m.pth", tensors(), {"wer": float("nan")})
    assert not list(tmp_path.iterdir())
