"""Mission files: the published form, what doesn't fit, writing without a moment of half a file."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from rwkv_speech.errors import UserError
from rwkv_speech.trained import (
    MissionFileError,
    best_mission_file,
    newest_mission_file,
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
        assert "rwkv-adapter-7.pth" in refusal(read_mission_file, save(tmp_path, content))
        assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap))).close()
    assert trap.exists(), "the case is void: the trap doesn't work"


@pytest.mark.parametrize("content", [[], {"a": 1}, {3: torch.zeros(1)}, torch.zeros(3)], ids=str)
def test_other_content_is_refused(tmp_path, content):
    refusal(read_mission_file, save(tmp_path, content))


def test_no_file_an_empty_one_a_truncated_one_and_a_bad_json(tmp_path):
    assert "no such file" in refusal(read_mission_file, tmp_path / "rwkv-adapter-1.pth")
    assert "no such file" in refusal(read_mission_file, tmp_path)
    path = save(tmp_path, tensors())
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert str(path) in refusal(read_mission_file, path)
    path.write_bytes(whole)
    path.with_suffix(".json").write_text('{"downsample_k": ')
    assert "rwkv-adapter-7.json" in refusal(read_mission_file, path)


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


def test_the_newest_is_told_by_modification_time(tmp_path):
    assert "rwkv-adapter-*.pth" in refusal(newest_mission_file, tmp_path)
    assert "train first" in refusal(newest_mission_file, tmp_path / "nowhere")
    for name, when in (("9000", 1), ("20", 3), ("20-run2", 2)):
        path = tmp_path / f"rwkv-adapter-{name}.pth"
        path.touch()
        os.utime(path, (when, when))
    for name in ("other.pth", "rwkv-adapter-30.json", ".rwkv-adapter-31.pth.99", "rwkv-adapter-32.pth.tmp"):
        (tmp_path / name).touch()
    assert newest_mission_file(tmp_path).name == "rwkv-adapter-20.pth"


def test_the_best_is_that_of_the_newest_run(tmp_path):
    """Of run a, step 20 was better than step 10, and 30 wasn't; run b was never validated."""

    def write(step, run, **info):
        path = tmp_path / f"rwkv-adapter-{step}.pth"
        write_mission_file(path, tensors(), {"step": step, "run": run} | info)
        os.utime(path, ns=(step * 10**9, step * 10**9))

    write(5, "b", wer=0.1, best_by="wer")
    write(10, "a", wer=0.5, best_by="wer")
    write(30, "a", wer=0.4)
    write(20, "a", wer=0.3, best_by="wer")
    path, which = best_mission_file(tmp_path)
    assert path.name == "rwkv-adapter-20.pth"
    assert which == "the best of its run by validation (wer 0.3); the newest is rwkv-adapter-30.pth"
    write(40, "c", train_loss=1.0)
    assert best_mission_file(tmp_path) == (tmp_path / "rwkv-adapter-40.pth", "the newest")
    write(50, "d", wer=0.9, best_by="wer")
    assert best_mission_file(tmp_path)[1] == "the best of its run by validation (wer 0.9)"
    foreign = tmp_path / "rwkv-adapter-60.pth"
    torch.save(tensors(), foreign)
    os.utime(foreign, ns=(60 * 10**9, 60 * 10**9))
    assert best_mission_file(tmp_path) == (foreign, "the newest")


@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
def test_numbers_that_are_none_are_refused(tmp_path, number):
    spoilt = tensors()
    name = "speech_encoder.adapter.2.weight"
    spoilt[name] = spoilt[name].clone()
    spoilt[name][0, 1] = number
    torch.save(spoilt, tmp_path / "m.pth")
    assert f"{name} holds numbers that are not finite" in refusal(read_mission_file, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="JSON"):
        write_mission_file(tmp_path / "n.pth", tensors(), {"wer": number})
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]
