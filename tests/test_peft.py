"""LoRA and its kin: learnt by the program, kept as peft itself reads it, merged, resumed, beside packed matrices."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_speech import lm
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.errors import UserError
from rwkv_speech.lm import peft
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.quantised import QuantisedLinear
from rwkv_speech.mission_file import read_mission_file, write_mission_file
from rwkv_speech.options import PEFT_METHODS
from tests.tiny import QUICK, answers, at_door, do, losses, missions

pytestmark = pytest.mark.usefixtures("voiced")
ROOT = Path(__file__).parents[1]
TOKENS = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(0))
METHODS = ["lora", "dora", "pissa", "miss"]
FAST = ["--lr_init=2e-2", "--lr_final=2e-2", "--epoch_count=1", "--epoch_steps=4", "--peft_config=r=4"]


@torch.inference_mode()
def logits_of(model):
    return model.logits(model(TOKENS)[0])


@torch.inference_mode()
def decoded(model):
    """The same, token by token."""
    found, state = [], None
    for token in TOKENS.T:
        hidden, state = model(token[:, None], state)
        found.append(model.logits(hidden))
    return torch.cat(found, 1)


@pytest.fixture(scope="module")
def learnt(world, tmp_path_factory):
    """Method -> its project, and the logits of the model at the end of its training."""
    found = {}
    for method in METHODS:
        project, kept = tmp_path_factory.mktemp(method), []
        with pytest.MonkeyPatch.context() as patch:
            plain = TrainingModule.__init__

            def keep(self, model, *arguments, plain=plain, kept=kept, **how):
                kept.append(model)
                plain(self, model, *arguments, **how)

            patch.setattr(TrainingModule, "__init__", keep)
            assert do("train", world, project, f"--train_type=adapter+state+{method}", *FAST) == 0
        found[method] = project, logits_of(kept[0].language_model.eval())
    return found


@pytest.fixture(scope="module")
def elsewhere(world, learnt, tmp_path_factory):
    """Method -> logits in a process of its own: as kept, merged, by peft alone."""
    folder = tmp_path_factory.mktemp("elsewhere")
    program = (
        "import sys, torch; from peft import PeftModel; from rwkv_speech import SpeechRWKV, lm\n"
        "tokens, found = torch.load(sys.argv[3]), {}\n"
        "for file in sys.argv[5:]:\n"
        "    parts = {'encoder': sys.argv[2], 'adapter': file}\n"
        "    models = [SpeechRWKV.from_pretrained(sys.argv[1], **parts, merge=merge) for merge in (False, None)]\n"
        "    models = [model.language_model for model in models] + [lm.load(sys.argv[1])]\n"
        "    for name, x in torch.load(file).items():\n"  # the states, which are no part of what peft keeps
        "        if 'time_state' in name: models[2].get_parameter(name.partition('.')[2]).copy_(x)\n"
        "    alone = PeftModel.from_pretrained(models[2], file.removesuffix('.pth'))\n"
        "    with torch.inference_mode():\n"
        "        hidden = [model(tokens)[0] for model in (*models[:2], alone)]\n"
        "        found[file] = [model.logits(x) for model, x in zip(models, hidden)]\n"
        "torch.save(found, sys.argv[4])"
    )
    torch.save(TOKENS, folder / "tokens.pt")
    files = [str(project / "rwkv-adapter-4.pth") for project, _ in learnt.values()]
    arguments = [world.model, world.encoder, folder / "tokens.pt", folder / "found.pt", *files]
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(learnt, torch.load(folder / "found.pt").values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_learnt_is_the_same_elsewhere_merged_or_not_and_by_peft_alone(world, learnt, elsewhere, method):
    project, expected = learnt[method]
    as_kept, merged, by_peft = elsewhere[method]
    file = project / "rwkv-adapter-4.pth"
    without = world.speech_rwkv(adapter=read_mission_file(file).__class__(file, torch.load(file))).language_model
    assert (logits_of(without) - expected).abs().max() > 0.02, "the case is void: nothing is learnt"
    torch.testing.assert_close(as_kept, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_peft, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)
    config = json.loads((project / "rwkv-adapter-4/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model.pth"
    assert missions(project)["rwkv-adapter-4.pth"][1]["peft"] == ("lora" if method == "pissa" else method)


@pytest.mark.parametrize("method", METHODS)
def test_token_by_token_it_is_the_same(world, learnt, method):
    project, expected = learnt[method]
    for merge in (False, True):
        model = world.speech_rwkv(adapter=project / "rwkv-adapter-4.pth", merge=merge).language_model
        torch.testing.assert_close(decoded(model), expected, atol=1e-4, rtol=0)


def test_a_merged_model_is_one_as_any_other(world, learnt):
    plain = world.speech_rwkv(adapter_hidden=32).language_model
    merged = world.speech_rwkv(adapter=learnt["lora"][0] / "rwkv-adapter-4.pth").language_model
    assert [*merged.state_dict()] == [*plain.state_dict()]
    assert [type(x) for x in merged.modules()] == [type(x) for x in plain.modules()]
    assert all(block.whole_step for block in merged.blocks)
    beside = world.speech_rwkv(adapter=learnt["lora"][0] / "rwkv-adapter-4.pth", merge=False)
    assert not any(block.whole_step for block in beside.language_model.blocks)
    names = [x for x in beside.language_model.state_dict() if "lora" in x]
    assert len(names) == 2 * 2 * 8
    assert not any(name.startswith("head") for name in names)


def test_in_bf16_the_learnt_weights_are_fp32_and_merging_is_done_in_it(world, learnt):
    file = learnt["lora"][0] / "rwkv-adapter-4.pth"
    beside = world.speech_rwkv(adapter=file, merge=False, dtype=torch.bfloat16).language_model
    kept = load_file(file.with_suffix("") / "adapter_model.safetensors")
    for name, x in peft.weights(beside).tensors.items():
        assert x.dtype == torch.float32
        assert torch.equal(x, kept[name]), "through bf16 it would have lost digits"
    merged = world.speech_rwkv(adapter=file, dtype=torch.bfloat16).language_model
    of_file = lm.load(world.model, dtype=torch.bfloat16)
    config = json.loads((file.with_suffix("") / "adapter_config.json").read_text())
    changed = 0
    for name, x in of_file.named_parameters():
        A, B = (kept.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
        if A is not None:  # in fp32, rounded once
            expected = (x.float() + config["lora_alpha"] / config["r"] * (B @ A)).bfloat16()
            found = merged.get_parameter(name)
            assert (found == expected).float().mean() >= 0.999, name
            changed += (found != x).sum()
    assert changed > 1000, "the case is void"


@pytest.mark.parametrize("method", ["pissa", "miss"])
def test_an_interrupted_run_ends_as_if_it_were_not(world, learnt, tmp_path, monkeypatch, method):
    flags = [f"--train_type=adapter+state+{method}", *FAST, "--save_steps=2"]
    plain = TrainingModule.training_step

    def cut(self, batch, index):
        if self.global_step == 3:
            raise InterruptedError
        return plain(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", cut)
        with pytest.raises(InterruptedError):
            do("train", world, tmp_path, *flags)
    do("train", world, tmp_path, *flags)
    one, other = (read_mission_file(folder / "rwkv-adapter-4.pth") for folder in (learnt[method][0], tmp_path))
    assert one.peft.equals(other.peft)
    assert all(torch.equal(x, other.tensors[name]) for name, x in one.tensors.items())
    assert any(x.abs().max() > 0.01 for name, x in one.peft.tensors.items() if "lora_B" in name or "miss" in name)
    # Matrices that PiSSA changes, by numbers that vary with the threads, don't decide on whether a run goes on.
    runs = [json.loads((folder / "checkpoints/run-1/run.json").read_text()) for folder in (tmp_path, learnt["lora"][0])]
    assert len({run["options"]["load_model_weights"] for run in runs}) == 1
    assert (tmp_path / "checkpoints/run-1").is_dir()
    assert not (tmp_path / "checkpoints/run-2").exists(), "it did not go on"


def test_only_what_is_named_learns_and_files_that_are_not_kept_go(world, learnt, tmp_path):
    """By lora alone, beside a mission file that brings LoRA: it goes on from there, the rest stays."""
    file = learnt["lora"][0] / "rwkv-adapter-4.pth"
    before = read_mission_file(file)
    flags = ["--train_type=lora", f"--adapter={file}", *FAST[:4], "--save_steps=1", "--average=2"]
    do("train", world, tmp_path, *flags)
    after, mean = (read_mission_file(tmp_path / f"rwkv-adapter-4{suffix}.pth") for suffix in ("", "-avg2"))
    assert all(torch.equal(x, after.tensors[name]) for name, x in before.tensors.items())
    assert not any(torch.equal(x, after.peft.tensors[name]) for name, x in before.peft.tensors.items())
    third = read_mission_file(tmp_path / "rwkv-adapter-3.pth")
    for name, x in mean.peft.tensors.items():
        torch.testing.assert_close(x, (third.peft.tensors[name] + after.peft.tensors[name]) / 2)
    folders = {path.name for path in tmp_path.glob("rwkv-adapter-*") if path.is_dir()}
    assert folders == {path.stem for path in tmp_path.glob("*.pth")}
    assert not (tmp_path / "rwkv-adapter-1").exists()
    # What peft put there stays too where a state alone learns, and is written again.
    do("train", world, tmp_path / "state", "--train_type=state", f"--adapter={file}", *FAST[:4])
    assert read_mission_file(tmp_path / "state/rwkv-adapter-4.pth").peft.equals(before.peft)


def test_prediction_and_evaluation_find_it(world, learnt, monkeypatch, capsys):
    project = learnt["lora"][0]
    path, _ = world.utterances[0]
    expected = answers(world.speech_rwkv(adapter=project / "rwkv-adapter-4.pth", merge=False), [path], max_new_tokens=9)
    flags = ["--op=predict", f"--proj_dir={project}", "--max_new_tokens=9", *world.flags[:1], "--accelerator=cpu"]
    status, printed = at_door(monkeypatch, capsys, *flags, "--file_path", path, "--format=json")
    assert status == 0
    assert json.loads(printed.out)["text"] == expected[0]
    assert do("eval", world, project, "--max_new_tokens=4", "--eval_bsz=24") == 0


# --- beside packed matrices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [6, 7])
@pytest.mark.parametrize(("quant", "method"), [("nf4", "lora"), ("int8", "dora"), ("nf4", "miss")])
def test_beside_packed_matrices_gradients_are_those_of_what_they_stand_for(tmp_path, generation, quant, method):
    sizes = official_sizes(generation=generation, n_layer=2, n_embd=64, vocab_size=257, head_size=32)
    torch.save(random_weights(sizes, seed=1), tmp_path / "model.pth")
    packed, dense = lm.load(tmp_path / "model.pth", quant=quant), lm.load(tmp_path / "model.pth")
    with torch.no_grad():
        for name, layer in packed.named_modules():
            if isinstance(layer, QuantisedLinear):
                dense.get_submodule(name).weight.copy_(layer.weight)
    peft.inject(packed, peft.configuration(method, {"r": 4}))
    with torch.no_grad():
        for i, x in enumerate(peft.parameters(packed).values()):
            x += 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
    found = peft.weights(packed)
    peft.inject(dense, found.config, found.tensors)
    grads = []
    for model in (packed, dense):
        logits = model.logits(model(TOKENS)[0])
        logits.square().mean().backward()
        grads.append({name: x.grad for name, x in peft.parameters(model).items()})
    for name, x in grads[1].items():
        assert (grads[0][name] - x).norm() < 1e-4 * x.norm(), name
    beside = logits_of(packed)
    torch.testing.assert_close(decoded(packed), beside, atol=1e-4, rtol=0)
    peft.merge(packed)
    assert packed.quant is None
    torch.testing.assert_close(logits_of(packed), beside, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded(packed), beside, atol=1e-4, rtol=0)


def test_beside_packed_matrices_it_learns_by_the_program(world, tmp_path):
    flags = ["--quant=nf4", "--train_type=adapter+lora", "--peft_config=r=4", *FAST[:2], "--epoch_count=3"]
    do("train", world, tmp_path, *flags)
    curve = losses(tmp_path)
    assert sum(curve[i] for i in range(16, 19)) / 3 < sum(curve[i] for i in range(1, 4)) / 3 - 0.7
    model = world.speech_rwkv(adapter=tmp_path / "rwkv-adapter-18.pth").language_model
    assert (model.quant, model.peft is None) == ("nf4", False), "merging would unpack it"


# --- files of others, several missions, refusals ---------------------------------------------------------------------


def test_a_lora_file_of_rwkv_peft_loads_with_its_alpha(world, learnt, tmp_path, monkeypatch, capsys):
    """As RWKV-PEFT has it: y = x W^T + (alpha / r) x A^T B^T."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    plain = lm.load(world.model)
    for name in ("blocks.0.att.key", "blocks.1.att.key", "blocks.1.ffn.value"):
        weight = plain.get_submodule(name).weight
        A, B = (0.3 * torch.randn(shape, generator=generator) for shape in ((4, weight.shape[1]), (weight.shape[0], 4)))
        tensors |= {f"{name}.lora_A": A.bfloat16(), f"{name}.lora_B": B.bfloat16()}
        with torch.no_grad():
            weight.copy_(weight + 12 / 4 * (B.bfloat16().double() @ A.bfloat16().double()).float())
    torch.save(tensors, tmp_path / "lora.pth")
    given = {"load_peft": tmp_path / "lora.pth", "peft_config": {"lora_alpha": 12}}
    for merge in (False, True):
        model = world.speech_rwkv(merge=merge, **given).language_model
        torch.testing.assert_close(logits_of(model), logits_of(plain), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="name that by load_peft"):
        world.speech_rwkv(peft_config={"lora_alpha": 12})
    with pytest.raises(UserError, match=r"lora\.pth: does not hold its lora_alpha"):
        world.speech_rwkv(load_peft=tmp_path / "lora.pth")
    flags = [*world.flags, "--op=eval", f"--adapter={learnt['miss'][0] / 'rwkv-adapter-4.pth'}", "--num_workers=0"]
    flags += [f"--proj_dir={tmp_path / 'out'}", f"--load_peft={tmp_path / 'lora.pth'}", "--quant=nf4"]
    flags += ["--max_new_tokens=2", "--eval_bsz=24"]
    assert at_door(monkeypatch, capsys, *flags, "--peft_config=lora_alpha=12")[0] == 0
    status, printed = at_door(monkeypatch, capsys, *flags, "--peft_config=lora_alpha=11", "--resume")
    assert (status, "--resume, but" in printed.err, "another one: adapter was" in printed.err) == (2, True, True)
    status, printed = at_door(monkeypatch, capsys, *flags)
    assert (status, printed.err.count("\n")) == (2, 1)


@pytest.mark.parametrize("how", ["ours", "theirs"])
def test_the_weights_of_every_method_go_through_a_file_and_are_merged(world, tmp_path, how):
    """theirs: of the methods that change frozen matrices, as the library itself writes them."""
    with pytest.raises(UserError, match="weights of the method 'shira' of peft: expected lora, "):
        peft.inject(lm.load(world.model), {"peft_type": "SHIRA"})
    compilers = os.environ.get("CC"), os.environ.get("CXX")
    needs = {"ia3": {"feedforward_modules": ["value"]}, "c3a": {"block_size": 32}, "road": {"group_size": 32}}
    for method in PEFT_METHODS if how == "ours" else ("pissa", "olora"):
        model = lm.load(world.model)
        peft.inject(model, peft.configuration(method, needs.get(method, {})))
        with torch.no_grad():
            for i, x in enumerate(peft.parameters(model).values()):
                x += 0.03 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        expected = logits_of(model)
        assert (expected - logits_of(lm.load(world.model))).abs().max() > 0.05, f"{method}: the case is void"
        if how == "ours":
            peft.write_folder(tmp_path, peft.weights(model))
        else:
            made = import_module("peft")
            raw = made.get_peft_model_state_dict(model)
            save_file({f"base_model.model.{n}": x.contiguous() for n, x in raw.items()}, tmp_path / peft.WEIGHTS)
            model.peft.config.save_pretrained(tmp_path)
        for _ in range(2):
            found = peft.read_folder(tmp_path)
            again = lm.load(world.model)
            peft.inject(again, found.config, found.tensors)
            torch.testing.assert_close(logits_of(again), expected, atol=1e-4, rtol=0, msg=method)
            peft.write_folder(tmp_path, peft.weights(again))  # which is read in turn
        peft.merge(again)
        torch.testing.assert_close(logits_of(again), expected, atol=1e-4, rtol=0, msg=method)
    assert (os.environ.get("CC"), os.environ.get("CXX")) == compilers  # BOFT sets them


def test_on_two_processes_what_stays_is_written_too(world, learnt, tmp_path):
    """By a state alone, beside a mission file with LoRA, under DeepSpeed, to which frozen weights are constants."""
    file = learnt["lora"][0] / "rwkv-adapter-4.pth"
    flags = [*world.flags, *QUICK, f"--proj_dir={tmp_path}", "--train_type=state", f"--adapter={file}", *FAST[:2]]
    flags += ["--epoch_count=1", "--epoch_steps=1", "--strategy=deepspeed_stage_1", "--devices=2"]
    done = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "holds no mission file" not in done.stderr
    written = read_mission_file(tmp_path / "rwkv-adapter-1.pth")
    assert written.peft.equals(read_mission_file(file).peft)


def test_missions_share_it(world, learnt, tmp_path):
    file = read_mission_file(learnt["lora"][0] / "rwkv-adapter-4.pth")
    label = tmp_path / "label.pth"
    write_mission_file(label, file.tensors, {**file.info, "mission": "label", "labels": ["a"]}, file.peft)
    model = world.speech_rwkv(adapter=[file.path, label], merge=False)
    assert len(model.tasks) == 2
    assert len(peft.parameters(model.language_model)) == 2 * 2 * 8
    write_mission_file(label, file.tensors, {**file.info, "mission": "label", "peft": None})
    with pytest.raises(UserError, match="change the language model differently"):
        world.speech_rwkv(adapter=[file.path, label])

    lines = [json.loads(line) for line in (world.folder / "train.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line |= {"audio": str(world.folder / line["audio"]), "mission": ("transcribe", "translate")[i % 2]}
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [f"--data={tmp_path / 'both.jsonl'}", "--train_type=state+adapter+lora", *FAST]
    do("train", world, tmp_path, *flags, "--peft_lr_scale=0")
    one, other = (read_mission_file(tmp_path / name / "rwkv-adapter-4.pth") for name in ("transcribe", "translate"))
    assert one.peft.equals(other.peft)
    assert not torch.equal(*(x.tensors["language_model.blocks.0.att.time_state"] for x in (one, other)))
    assert all(not x.any() for name, x in one.peft.tensors.items() if "lora_B" in name), "by a learning rate of 0"


def test_chance_drops_in_training_only(world):
    model = world.speech_rwkv(adapter_hidden=8).language_model
    peft.inject(model, peft.configuration("lora", {"r": 4, "lora_dropout": 0.5, "init_lora_weights": False}))
    assert torch.equal(logits_of(model), logits_of(model))
    assert not torch.equal(logits_of(model.train()), logits_of(model))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train_type=adapter+stat"], "'stat' is no part that can be trained: expected adapter, state, or"),
        (["--train_type=lora"], "name a mission file by --adapter"),
        (["--train_type=adapter+lora+miss"], "one method of peft"),
        (["--train_type=adapter+lora", "--peft_config=rank=4"], "lora has no setting 'rank', but "),
        (["--train_type=adapter+lora", "--peft_config=r=0"], "`r` should be a positive integer"),
        (["--train_type=adapter+lora", "--peft_config=target_modules=keys+values"], "lora can't be put beside"),
        (["--train_type=adapter+lora", "--peft_config=bias=all"], "peft_config: bias does not go here"),
        (["--train_type=adapter+lora", "--peft_config=modules_to_save=head+emb"], "modules_to_save does not go here"),
        (["--train_type=adapter+lora", "--peft_config=megatron_config=x"], "megatron_config does not go here"),
        (["--train_type=adapter+lora", "--peft_config=target_modules=key+emb"], "target_modules: emb is no matrix"),
        (["--train_type=adapter+shira"], "'shira' is no part that can be trained: expected adapter, state, or of peft"),
        (["--train_type=adapter+lora", "--peft_config=r"], "expected JSON, or r=16"),
        (["--peft_config=r=4"], "--peft_config goes with a method of peft"),
        (["--train_type=adapter+pissa", "--quant=nf4"], "pissa changes the frozen weights: leave out --quant nf4"),
        (["--train_type=adapter+lora", "--adapter=MISS"], "there are weights of miss already"),
    ],
    ids=[
        "part",
        "alone",
        "two",
        "setting",
        "rank",
        "targets",
        "bias",
        "modules",
        "import",
        "embedding",
        "integers",
        "form",
        "without",
        "packed",
        "another",
    ],
)
def test_what_makes_no_sense_is_one_line(world, learnt, tmp_path, monkeypatch, capsys, flags, said):
    flags = [flag.replace("MISS", str(learnt["miss"][0] / "rwkv-adapter-4.pth")) for flag in flags]
    status, printed = at_door(monkeypatch, capsys, f"--proj_dir={tmp_path}", *world.flags, *flags)
    assert (status, printed.err.count("\n")) == (2, 1), printed.err
    assert said in printed.err
    assert not last_files(tmp_path)


def last_files(folder):
    return [*folder.glob("*.pth")]


def test_without_the_package_it_is_one_line(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    status, printed = at_door(monkeypatch, capsys, f"--proj_dir={tmp_path}", *world.flags, "--train_type=adapter+lora")
    assert status == 2
    assert printed.err.endswith("pip install peft, or sh demo/setup.sh peft\n")


def test_settings_as_json_and_as_pairs():
    from rwkv_speech.options import peft_settings

    expected = {"r": 16, "lora_alpha": 32.5, "use_rslora": True, "target_modules": ["key", "value"]}
    assert peft_settings("r=16, lora_alpha=32.5, use_rslora=True, target_modules=key+value") == expected
    assert peft_settings(json.dumps(expected)) == expected
