"""What is exported, as others read it: the rwkv package, torch and safetensors alone, the hub's cache."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from rwkv_speech import lm
from rwkv_speech.errors import UserError
from rwkv_speech.lm import peft
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.mission_file import read_mission_file, write_mission_file
from rwkv_speech.ops.export import _write_merged
from rwkv_speech.options import Options
from tests.tiny import at_door, do

TOKENS = torch.randint(1, 300, (40,), generator=torch.Generator().manual_seed(0))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits_of(model):
    return model.logits(model(TOKENS[None])[0])[0]


def write_mission(folder, model, **info):
    """A mission file with states, and LoRA that is not nothing."""
    sizes = model.sizes
    N = sizes.head_size
    tensors = {
        f"language_model.blocks.{i}.att.time_state": normal(sizes.n_head, N, N, seed=i) for i in range(sizes.n_layer)
    }
    for place, (out, inputs) in {0: (8, 160), 2: (sizes.n_embd, 8)}.items():
        tensors[f"speech_encoder.adapter.{place}.weight"] = normal(out, inputs)
        tensors[f"speech_encoder.adapter.{place}.bias"] = normal(out)
    peft.inject(model, peft.configuration("lora", {"r": 4, "lora_alpha": 12}))
    with torch.no_grad():
        for i, x in enumerate(peft.parameters(model).values()):
            x.copy_(0.1 * normal(*x.shape, seed=i))
        for i, state in enumerate(model.time_states):
            state.copy_(tensors[f"language_model.blocks.{i}.att.time_state"])
    path = folder / "rwkv-adapter-7.pth"
    said = {"mission": "transcribe", "generation": sizes.generation, "language_model": "model.pth", **info}
    write_mission_file(path, tensors, said, peft.weights(model))
    return path


@pytest.fixture(scope="module", params=[6, 7], ids=["rwkv6", "rwkv7"])
def made(request, tmp_path_factory):
    """Folder with model.pth and a mission file, and the model of both, unmerged."""
    folder = tmp_path_factory.mktemp("made")
    sizes = official_sizes(generation=request.param, n_layer=2, n_embd=128, vocab_size=300)
    torch.save(random_weights(sizes, seed=1), folder / "model.pth")
    model = lm.load(folder / "model.pth")
    write_mission(folder, model)
    return folder, model


@pytest.fixture
def export(monkeypatch, capsys):
    def run(folder, to, output, *flags):
        flags = ("--op=export", f"--to={to}", f"--adapter={folder / 'rwkv-adapter-7.pth'}", *flags)
        status, printed = at_door(monkeypatch, capsys, *flags, f"--output_dir={output}")
        assert status == 0, printed.err
        return printed.out.removesuffix("\n")

    return run


PACKAGE = """
import sys, torch
from rwkv.model import RWKV
path, state_path, tokens, out = sys.argv[1:]
model, state = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32"), None
if state_path:  # as RWKV-Runner gives it to a model of this generation
    state = model.generate_zero_state()
    for name, x in torch.load(state_path).items():
        state[3 * int(name.split(".")[1]) + 1] = x.float().contiguous()
torch.save(model.forward(torch.load(tokens).tolist(), state, full_output=True)[0], out)
"""


def test_the_rwkv_package_computes_our_logits(made, export, tmp_path):
    folder, model = made
    merged = export(folder, "merged", tmp_path, f"--load_model={folder / 'model.pth'}")
    assert merged == str(tmp_path / "model-rwkv-adapter-7.pth")
    state = export(folder, "state", tmp_path)
    torch.save(TOKENS, tmp_path / "tokens")
    seventh = model.generation == 7  # of which the package leaves the states in a file aside
    arguments = [merged, state if seventh else "", str(tmp_path / "tokens"), str(tmp_path / "out")]
    how = os.environ | {"RWKV_V7_ON": "1" if seventh else "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    done = subprocess.run([sys.executable, "-c", PACKAGE, *arguments], env=how, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out"), logits_of(model), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_of(lm.load(merged)), logits_of(model), atol=1e-4, rtol=0)


def test_the_merged_file_has_the_official_form_and_types(made, export, tmp_path):
    folder, model = made
    original = {name: x.bfloat16() for name, x in torch.load(folder / "model.pth").items()}
    torch.save(original, tmp_path / "bf16.pth")
    merged = torch.load(export(folder, "merged", tmp_path, f"--load_model={tmp_path / 'bf16.pth'}"))
    states = {f"blocks.{i}.att.time_state" for i in range(2)}
    assert merged.keys() == original.keys() | states
    changed = {name for name in original if not torch.equal(merged[name], original[name])}
    assert changed == {f"{n.partition('.lora_')[0]}.weight" for n in peft.parameters(model)}
    file = read_mission_file(folder / "rwkv-adapter-7.pth")
    for name in changed:  # by hand, in fp64, rounded once
        A, B = (file.peft.tensors[f"base_model.model.{name[:-7]}.lora_{x}.weight"].double() for x in "AB")
        exact = original[name].double() + 12 / 4 * B @ A
        assert merged[name].dtype == torch.bfloat16
        assert (merged[name] == exact.float().bfloat16()).float().mean() > 0.999
        torch.testing.assert_close(merged[name].double(), exact, rtol=2**-8, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_was_trained_beside_packed_matrices_is_merged_into_what_they_stand_for(made, export, tmp_path):
    folder, _ = made
    flags = [f"--load_model={folder / 'model.pth'}", "--quant=nf4"]
    packed = lm.load(folder / "model.pth", quant="nf4")
    write_mission(tmp_path, packed)
    merged = lm.load(export(tmp_path, "merged", tmp_path / "out", *flags))
    torch.testing.assert_close(logits_of(merged), logits_of(packed), atol=1e-4, rtol=0)


def test_states_as_rwkv_peft_and_web_rwkv_have_them(made, export, tmp_path, monkeypatch, capsys):
    folder, model = made
    written = export(folder, "state", tmp_path)
    state = torch.load(written)
    half = load_file(export(folder, "ai00", tmp_path))
    assert [*state] == [*half] == [f"blocks.{i}.att.time_state" for i in range(2)]
    for i, there in enumerate(model.time_states):
        name = f"blocks.{i}.att.time_state"
        assert torch.equal(state[name], there)
        # convert_safetensors.py of web-rwkv: .half(), and the last two dimensions of a time_state transposed
        assert torch.equal(half[name], there.detach().half().transpose(-2, -1))
    torch.save({name: -x for name, x in state.items()}, tmp_path / "other.pth")
    other = load_file(export(folder, "ai00", tmp_path / "other", f"--load_state={tmp_path / 'other.pth'}"))
    assert all(torch.equal(x, -half[name]) for name, x in other.items())
    flags = ("--op=export", "--to=state", f"--adapter={folder / 'rwkv-adapter-7.pth'}", f"--output_dir={tmp_path}")
    status, printed = at_door(monkeypatch, capsys, *flags)
    assert (status, printed.err.count("\n")) == (2, 1), printed.err
    assert f"{written} is there already" in printed.err


def test_a_full_disk_is_one_line(made, tmp_path):
    """Also one that is full before the mapped matrices are there; RLIMIT_FSIZE stands for the disk."""
    folder, _ = made
    options = Options.of(op="export", to="merged", load_model=str(folder / "model.pth"))
    file = read_mission_file(folder / "rwkv-adapter-7.pth")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (10_000, 500_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            with pytest.raises(UserError, match=r"cannot write .*merged\.pth: the file would be larger"):
                _write_merged(tmp_path / "merged.pth", file, options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*tmp_path.iterdir()]


def test_merging_takes_the_memory_of_a_few_matrices(tmp_path):
    """What torch allocates, by its own account; files are mapped."""
    sizes = official_sizes(generation=6, n_layer=8, n_embd=256, vocab_size=300)
    torch.save(random_weights(sizes, seed=0), tmp_path / "model.pth")
    path = write_mission(tmp_path, lm.load(tmp_path / "model.pth"))
    options = Options.of(op="export", to="merged", load_model=str(tmp_path / "model.pth"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _write_merged(tmp_path / "merged.pth", read_mission_file(path), options)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    merged, source = (tmp_path / name for name in ("merged.pth", "model.pth"))
    before = torch.load(source)
    changed = [x for name, x in torch.load(merged).items() if name in before and not torch.equal(x, before[name])]
    mapped = source.stat().st_size + sum(x.nbytes for x in changed)  # which count as if they were in memory
    largest = max(x.nbytes for x in changed)
    beside = path.stat().st_size + (path.with_suffix("") / "adapter_model.safetensors").stat().st_size
    assert len(changed) == 8 * 8
    assert peak - mapped < 2 * largest + 2 * beside, "a matrix, what is added to it, and the small weights"


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory):
    project = tmp_path_factory.mktemp("evaluated")
    do("train", world, project, "--train_type=adapter+state+lora", "--peft_config=r=2", "--epoch_count=1")
    do("eval", world, project, "--max_new_tokens=4", "--eval_bsz=24")
    return project


def test_a_folder_for_the_hub_is_fetched_by_its_name(world, evaluated, tmp_path, monkeypatch, capsys):
    """Through the hub's own cache, which is read without a network."""
    monkeypatch.setattr("rwkv_speech.mission_hub.hub_is_reachable", lambda: False)
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    place = cache / "models--owner--name"
    for suffix in (".pth", ".json"):  # by another name, by which its scores are known all the same
        shutil.copy(evaluated / f"rwkv-adapter-6{suffix}", tmp_path / f"asr{suffix}")
    shutil.copytree(evaluated / "rwkv-adapter-6", tmp_path / "asr")
    flags = ["--op=export", "--to=hub", f"--proj_dir={evaluated}", f"--adapter={tmp_path / 'asr.pth'}"]
    flags += [f"--output_dir={place / 'snapshots/abc'}"]
    status, printed = at_door(monkeypatch, capsys, *flags)
    assert (status, printed.out) == (0, f"{place / 'snapshots/abc'}\n")
    (place / "refs").mkdir()
    (place / "refs/main").write_text("abc")

    ours = world.speech_rwkv(adapter=evaluated / "rwkv-adapter-6.pth", merge=False)
    theirs = world.speech_rwkv(adapter="owner/name", merge=False)
    assert all(torch.equal(x, theirs.trainable_state_dict()[n]) for n, x in ours.trainable_state_dict().items())
    assert ours.peft_weights().equals(theirs.peft_weights())
    path, _ = world.utterances[0]
    flags = ["--op=predict", "--adapter=owner/name", *world.flags[:2], "--accelerator=cpu", "--max_new_tokens=3"]
    assert at_door(monkeypatch, capsys, *flags, "--file_path", path)[0] == 0

    card = (place / "snapshots/abc/README.md").read_text()
    told = json.loads((place / "snapshots/abc/rwkv-adapter-asr.json").read_text())
    assert told["encoder"] == "encoder"
    assert str(world.folder) not in card
    wer = json.loads((evaluated / "eval/summary.json").read_text())["splits"].popitem()[1]["metrics"][0]
    row = f"| wer | {wer['value']:.4g} | {wer['interval'][0]:.4g} to {wer['interval'][1]:.4g} |"
    for part in ("\ntags: [rwkv, speech, transcribe]\n", "`model.pth`", "| lr_init | `0.001` |", "lora", row):
        assert part in card
    trained = sum(x.numel() for x in ours.trainable_state_dict().values())
    trained += sum(x.numel() for x in ours.peft_weights().tensors.values())
    assert f"{trained:,} trained parameters" in card

    flags = ["--op=export", "--to=hub", f"--proj_dir={evaluated}", f"--output_dir={place / 'snapshots/abc'}"]
    status, printed = at_door(monkeypatch, capsys, *flags)
    assert (status, "name a new folder" in printed.err) == (2, True)
    # Scores with other states in the place of the file's are not its own.
    states = {name.partition(".")[2]: x + 1 for name, x in ours.trainable_state_dict().items() if "time_state" in name}
    torch.save(states, tmp_path / "states.pth")
    more = [f"--load_state={tmp_path / 'states.pth'}", "--max_new_tokens=4", "--eval_bsz=24"]
    with pytest.raises(UserError, match=r"--resume, but .* adapter was .*, is .*"):
        do("eval", world, evaluated, *more, "--resume")
    do("eval", world, evaluated, *more)
    assert at_door(monkeypatch, capsys, *flags[:-1], f"--output_dir={tmp_path / 'later'}")[0] == 0
    assert "Not evaluated." in (tmp_path / "later/README.md").read_text()


def test_a_mission_that_is_not_here_is_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_speech.mission_hub.hub_is_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"owner/other: no such file, and as a mission .* the hub cannot be reached"):
        world.speech_rwkv(adapter="owner/other")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--op=export"], "--op export needs --to: merged, state, ai00 or hub"),
        (["--op=export", "--to=merged"], "--load_model is required"),
        (["--op=export", "--to=gguf"], "--to: invalid choice: 'gguf'"),
        (["--op=eval", "--to=state", "--load_model=x"], "--to goes with --op export, not eval"),
        (["--op=export", "--to=state", "--load_peft=x"], "--load_peft goes with --to merged"),
        (["--op=export", "--to=hub", "--load_state=x"], "--load_state does not go with --to hub"),
        (["--op=export", "--to=state", "--proj_dir=/nowhere"], "holds no mission file"),
        (
            ["--op=export", "--to=merged", "OTHER"],
            "2 layers x (2, 64, 64), but the language model is an RWKV-6",
        ),
    ],
    ids=["form", "model", "unknown", "op", "peft", "state", "nothing", "another-model"],
)
def test_what_makes_no_sense_is_one_line(world, made, tmp_path, monkeypatch, capsys, flags, said):
    if "OTHER" in flags:
        flags = [*flags[:2], f"--load_model={world.model}", f"--adapter={made[0] / 'rwkv-adapter-7.pth'}"]
    output = [] if "--op=eval" in flags else [f"--output_dir={tmp_path / 'out'}"]
    status, printed = at_door(monkeypatch, capsys, *flags, *output)
    assert (status, printed.err.count("\n")) == (2, 1), printed.err
    assert said in printed.err
    assert not (tmp_path / "out").exists()
