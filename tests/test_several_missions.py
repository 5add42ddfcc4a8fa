"""Several missions in one model: each row with the state and the adapter of its own, in training and in decoding."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkv_speech.data.mixing import Mix
from rwkv_speech.data.sample import Row, fingerprint
from rwkv_speech.data.sources import split_weights
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.errors import UserError
from rwkv_speech.mission_file import best_mission_files, read_mission_file, write_mission_file
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.speech.recording import Recording
from tests.tiny import QUICK, do

MISSIONS = ["transcribe", "label/first", "label/count", "translate"]
LABELS = {"label/first": list("abcdefghij"), "label/count": ["two", "three", "four", "five"]}


def answer(mission: str, text: str) -> str:
    by_mission = {"label/first": text[0], "label/count": ["two", "three", "four", "five"][len(text) - 2]}
    return by_mission.get(mission, text if mission == "transcribe" else text.upper())


def shaken(model: SpeechRWKV, seed: int) -> SpeechRWKV:
    """With other trained weights, of which states are large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.trainable_state_dict().items():
            x += torch.randn(x.shape, generator=generator) * (1.0 if "time_state" in name else 0.05)
    return model


@pytest.fixture(scope="module")
def files(world, tmp_path_factory) -> list[Path]:
    """A mission file of each mission, each with an adapter of its own."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(MISSIONS):
        model = shaken(world.speech_rwkv(mission=name, adapter_hidden=16), seed)
        model.task().labels = LABELS.get(name)
        path = folder / f"{seed}.pth"
        write_mission_file(path, model.trainable_state_dict(), model.describe())
    return [folder / f"{seed}.pth" for seed in range(len(MISSIONS))]


@pytest.fixture(scope="module")
def shared(files, tmp_path_factory) -> list[Path]:
    """The same with the first one's adapter in all of them."""
    folder = tmp_path_factory.mktemp("shared")
    adapter = {name: x for name, x in torch.load(files[0]).items() if "adapter" in name}
    for file in map(read_mission_file, files):
        write_mission_file(folder / file.path.name, file.tensors | adapter, file.info)
    return [folder / path.name for path in files]


def rows_of(world) -> list[Row]:
    """Two recordings for each mission, by turns."""
    return [
        Row(f"{i}", answer(mission, text), Recording(path), mission=mission)
        for i, ((path, text), mission) in enumerate(zip(world.utterances[:8], MISSIONS * 2, strict=True))
    ]


def loss_of(model: SpeechRWKV, rows: list[Row]) -> Tensor:
    return model.loss_sum(model.prepare([model.sample(row) for row in rows]))


def texts_of(model: SpeechRWKV, rows: list[Row], **how) -> list[str]:
    rows = [replace(row, text=None) for row in rows]
    results = model.decode(model.prepare([model.sample(row) for row in rows]), **how)
    return [model.text(result) for result in results]


@pytest.mark.parametrize("kind", ["files", "shared"])
@pytest.mark.parametrize("generation", [6, 7])
def test_a_mixed_batch_gives_each_row_what_it_gets_alone(request, world, tmp_path, kind, generation):
    paths = request.getfixturevalue(kind)
    if generation == 7:  # the same mission files, called those of the other generation
        from rwkv_speech.lm.initialise import official_sizes, random_weights

        sizes = official_sizes(generation=7, n_layer=2, n_embd=64, vocab_size=257, head_size=32)
        torch.save(random_weights(sizes, seed=1), tmp_path / "model.pth")
        for file in map(read_mission_file, paths):
            write_mission_file(tmp_path / file.path.name, file.tensors, file.info | {"generation": 7})
        paths = [tmp_path / path.name for path in paths]

    def load(adapter):
        if generation == 6:
            return world.speech_rwkv(adapter=adapter)
        return SpeechRWKV.from_pretrained(tmp_path / "model.pth", encoder=world.encoder, adapter=adapter)

    mixed = load(paths)
    assert [*mixed.tasks] == MISSIONS
    assert len(mixed.adapters) == (4 if kind == "files" else 1)
    rows = rows_of(world)
    alone = dict(zip(MISSIONS, map(load, paths), strict=True))
    together = loss_of(mixed, rows)
    apart = sum(loss_of(alone[row.mission], [row]) for row in rows)
    assert float(together) == pytest.approx(float(apart), rel=1e-5)
    of_another = sum(loss_of(alone["transcribe"], [replace(row, mission=None)]) for row in rows)
    assert float(together) != pytest.approx(float(of_another), rel=3e-4), "the case is void: all states are alike"

    texts = texts_of(mixed, rows)
    assert texts == [texts_of(alone[row.mission], [row])[0] for row in rows]
    assert all(text in LABELS[row.mission] for text, row in zip(texts, rows, strict=True) if row.mission in LABELS)

    together.backward()
    apart.backward()
    for name, model in alone.items():
        place = MISSIONS.index(name)
        for ours, theirs in zip(mixed.language_model.time_states, model.language_model.time_states, strict=True):
            torch.testing.assert_close(ours.grad[place], theirs.grad, rtol=1e-4, atol=1e-5)
    grads = [model.adapter.layers[2].weight.grad for model in alone.values()]
    expected = grads if kind == "files" else [sum(grads)]
    for adapter, grad in zip(mixed.adapters, expected, strict=True):
        torch.testing.assert_close(adapter.layers[2].weight.grad, grad, rtol=1e-4, atol=1e-5)


def test_processes_come_by_their_gradients_in_one_order(world, files):
    """Whatever is in their batches: ZeRO adds up what comes first, and second, and so on."""
    model, rows = world.speech_rwkv(adapter=files), rows_of(world)
    orders, found = [], []
    for name, x in model.trained_tensors().items():
        x.parameter.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))
    for some in (rows, rows[:1], rows[1:2], rows[2:4], []):
        batch = model.prepare([model.sample(row) for row in some])
        (model.loss_sum(batch) if some else model.no_loss(batch)).backward()
        orders.append([*found])
        found.clear()
    assert len(orders[0]) == 2 + 4 * 4
    assert orders == [orders[0]] * 5


def test_which_state_must_be_said_where_there_are_several(world, files):
    several, one = world.speech_rwkv(adapter=files).language_model, world.speech_rwkv().language_model
    for model, which in ((several, None), (one, torch.zeros(4, dtype=torch.int64))):
        with pytest.raises(ValueError, match="which initial states"):
            model(torch.zeros(4, 1, dtype=torch.int64), which=which)


def test_files_of_several_missions_that_do_not_go_together_are_refused(world, files, tmp_path):
    with pytest.raises(UserError, match="two are of one mission"):
        world.speech_rwkv(adapter=[files[0], files[0]])
    with pytest.raises(UserError, match="hold different adapters, which can't be shared"):
        world.speech_rwkv(adapter=files, share_adapter=True)
    other = shaken(world.speech_rwkv(mission="answer", downsample_k=2, adapter_hidden=16), 9)
    write_mission_file(tmp_path / "k.pth", other.trainable_state_dict(), other.describe())
    with pytest.raises(UserError, match="stack 2 and 5 frames"):
        world.speech_rwkv(adapter=[files[0], tmp_path / "k.pth"])
    with pytest.raises(UserError, match="has not learnt the mission 'answer', but: transcribe, label/first"):
        world.speech_rwkv(adapter=files).transcribe([torch.zeros(8000)], mission="answer")
    with pytest.raises(UserError, match=r"mission 'label/\.\.': expected a name of letters"):
        world.speech_rwkv(mission="label/..")


# --- from the flags on -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifests(world, tmp_path_factory) -> dict[str, Path]:
    """The recordings of the world with an answer for each mission, in a manifest of each."""
    folder = tmp_path_factory.mktemp("manifests")
    found = {}
    for mission in MISSIONS:
        found[mission] = folder / f"{mission.replace('/', '-')}.jsonl"
        lines = [
            {"audio": str(path), "text": answer(mission, text), "mission": mission, "id": path.stem}
            for path, text in world.utterances[:12]
        ]
        found[mission].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


def mixed_flags(manifests: dict[str, Path]) -> list[str]:
    a, b, c, d = manifests.values()
    return [f"--train_split={a}:2+{b}+{c}:0.5+{d}", f"--valid_split={b}+{a}", *QUICK, "--epoch_count=1"]


@pytest.fixture(scope="module")
def trained(world, manifests, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    do("train", world, folder, *mixed_flags(manifests), "--micro_bsz=6")
    return folder


def test_a_mixed_run_leaves_a_mission_file_of_each(world, trained):
    found = {mission: trained / mission / "rwkv-adapter-9.pth" for mission in MISSIONS}  # 24 + 12 + 6 + 12 rows by 6
    models = {}
    for mission, path in found.items():
        file = read_mission_file(path)
        models[mission] = world.speech_rwkv(adapter=path)
        assert file.mission == mission
        assert file.info["step"] == 9
        assert ("valid_loss" in file.info) is True
        assert ("best_by" in file.info) == (mission in ("transcribe", "label/first"))
        labels = {"label/first": sorted({text[0] for _, text in world.utterances[:12]})}
        if mission in labels:
            assert file.info["labels"] == labels[mission]
    first, *others = (torch.load(path) for path in found.values())
    for other in others:
        for name in first:
            assert torch.equal(first[name], other[name]) == ("adapter" in name), name
    columns = (trained / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"valid_transcribe_wer", "valid_label/first_accuracy"} <= set(columns)
    assert {path.parent.relative_to(trained).as_posix() for path, _ in best_mission_files(trained)} == set(MISSIONS)


def test_a_mixed_run_that_was_interrupted_ends_as_if_it_were_not(world, manifests, trained, tmp_path, monkeypatch):
    flags = [*mixed_flags(manifests), "--micro_bsz=6", "--save_steps=4"]
    plain = TrainingModule.training_step

    def step(self, batch, index):
        if self.trainer.global_step == 6:
            raise KeyError("power")
        return plain(self, batch, index)

    monkeypatch.setattr(TrainingModule, "training_step", step)
    with pytest.raises(KeyError, match="power"):
        do("train", world, tmp_path, *flags)
    monkeypatch.undo()
    do("train", world, tmp_path, *flags)
    for mission in MISSIONS:
        ours, theirs = (torch.load(folder / mission / "rwkv-adapter-9.pth") for folder in (tmp_path, trained))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_adapters_of_their_own(world, manifests, tmp_path):
    a, b, *_ = manifests.values()
    do("train", world, tmp_path, f"--train_split={a}+{b}", *QUICK, "--epoch_count=1", "--share_adapter=0")
    first, second = (read_mission_file(path) for path, _ in best_mission_files(tmp_path))
    assert not first.has_adapter_of(second)


def test_a_state_learns_beside_an_adapter_that_stays_as_it_is(world, manifests, trained, tmp_path):
    before = torch.load(trained / "transcribe/rwkv-adapter-9.pth")
    flags = [f"--train_split={manifests['translate']}", "--mission=translate", *QUICK, "--epoch_count=1"]
    flags.append(f"--adapter={trained / 'transcribe/rwkv-adapter-9.pth'}")
    for kind in ("state", "adapter"):
        folder = tmp_path / kind
        do("train", world, folder, *flags, f"--train_type={kind}")
        after = read_mission_file(next(folder.glob("*.pth")))
        assert after.mission == "translate"
        for name in before:
            learns = ("time_state" in name) == (kind == "state")
            assert torch.equal(before[name], after.tensors[name]) != learns, name
    with pytest.raises(UserError, match="--train_type state trains beside an adapter that stays as it is"):
        do("train", world, tmp_path / "new", *flags[:-1], "--train_type=state")
    with pytest.raises(UserError, match=r"--ctc_align 1\.0 teaches the adapter, which --train_type state leaves"):
        do("train", world, tmp_path / "new", *flags, "--train_type=state", "--ctc_align=1")


def test_evaluation_of_several_missions_has_a_line_for_each(world, manifests, trained, tmp_path, capsys):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(path.read_text() for path in manifests.values()))
    flags = ["--num_workers=0", "--max_new_tokens=3"]
    adapter = "+".join(str(path) for path, _ in best_mission_files(trained))
    do("eval", world, tmp_path, f"--eval_split={mixed}", f"--adapter={adapter}", *flags)
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    for mission, manifest in manifests.items():
        alone = tmp_path / "alone" / mission
        do(
            "eval",
            world,
            alone,
            f"--eval_split={manifest}",
            f"--adapter={trained / mission / 'rwkv-adapter-9.pth'}",
            *flags,
        )
        (ours,) = (tmp_path / "eval").glob(f"mixed-{mission.replace('/', '-')}.jsonl")
        (theirs,) = (alone / "eval").glob("*.jsonl")
        ours, theirs = ([json.loads(line) for line in path.read_text().splitlines()] for path in (ours, theirs))
        assert [(x["id"], x["hypothesis"], x["mission"]) for x in ours] == [
            (x["id"], x["hypothesis"], x["mission"]) for x in theirs
        ]
        assert {x["mission"] for x in ours} == {mission}
        assert f"{mixed}, {mission}" in json.dumps(summary)


def test_rows_that_name_no_mission(world, manifests, tmp_path):
    """Are transcripts, whatever the others are, unless it is said; of several missions in evaluation none is theirs."""
    data = tmp_path / "some.jsonl"
    lines = [json.loads(line) for line in manifests["label/first"].read_text().splitlines()]
    unnamed = [{"audio": x["audio"], "text": "ab", "id": f"t{x['id']}"} for x in lines]
    data.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *unnamed]))
    flags = [f"--train_split={data}", "--epoch_count=1", "--micro_bsz=12"]
    for more, expected in (([], "transcribe"), (["--mission=translate"], "translate")):
        project = tmp_path / expected
        do("train", world, project, *flags, *more)
        files = {file.mission: file for file in map(read_mission_file, project.glob("**/rwkv-adapter-*.pth"))}
        assert files.keys() == {expected, "label/first"}
        assert files["label/first"].info["labels"] == sorted({x["text"] for x in lines})
    with pytest.raises(UserError, match="rows name no mission, and there are mission files of label/first, transcribe"):
        do("eval", world, tmp_path / "transcribe", f"--eval_split={data}")
    with pytest.raises(UserError, match="its mission is 'label/first', but this run is of 'answer'"):
        do("train", world, tmp_path / "no", f"--train_split={manifests['label/first']}", "--mission=answer")


def test_what_would_be_taken_for_each_other_in_evaluation_is_refused(world, manifests, trained, tmp_path):
    mixed = tmp_path / "test.jsonl"
    mixed.write_text("".join(path.read_text() for path in manifests.values()))
    other = tmp_path / "test-label-first.jsonl"
    other.write_text(manifests["label/first"].read_text())
    with pytest.raises(UserError, match=r"two lines would go to eval/test-label-first\.jsonl"):
        do("eval", world, trained, f"--eval_split={mixed}+{other}")
    twice = tmp_path / "twice.jsonl"
    line = json.loads(manifests["transcribe"].read_text().splitlines()[0])
    twice.write_text("".join(json.dumps(line | change) + "\n" for change in ({}, {"mission": None})))
    with pytest.raises(UserError, match="occurs"):
        do("eval", world, trained, f"--eval_split={twice}", "--mission=transcribe")
    row = Row("a", "b", torch.zeros(10), mission="label/a")
    model = world.speech_rwkv(mission=["label/a", "label/b"])
    assert fingerprint([row], model.sample) != fingerprint([replace(row, mission="label/b")], model.sample)


def test_prediction_takes_one_of_several(world, trained, capsys):
    path, _ = world.utterances[0]
    flags = ["--num_workers=0", "--max_new_tokens=3", "--file_path", str(path)]
    with pytest.raises(UserError, match="there are mission files of label/count, label/first, transcribe, translate"):
        do("predict", world, trained, *flags)
    do("predict", world, trained, "--mission=label/count", *flags)
    assert capsys.readouterr().out.strip() in LABELS["label/count"]
    with pytest.raises(UserError, match="--mission answer: the mission files are of"):
        do("predict", world, trained, "--mission=answer", *flags)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_a_pass_takes_rows_as_often_as_their_split_weighs():
    mix = Mix([4, 10, 3], [2, 0.5, 1], seed=1)
    assert len(mix) == 8 + 5 + 3
    seen = set()
    for epoch in range(2):
        counts = np.bincount(mix(epoch), minlength=17)
        assert counts[:4].tolist() == [2] * 4
        assert counts[14:].tolist() == [1] * 3
        assert sorted(counts[4:14].tolist()) == [0] * 5 + [1] * 5
        seen |= {i for i in range(4, 14) if counts[i]}
    assert seen == set(range(4, 14)), "the second epoch takes the other half"
    assert mix.copies.tolist() == [0] * 4 + [1] * 4 + [0] * 5 + [0] * 3
    seconds = np.arange(17.0)
    for epoch in range(4):
        assert (np.sort(seconds[mix(epoch)]) <= np.sort(mix.longest(seconds))).all()


def test_weights_stand_behind_names(tmp_path):
    place = tmp_path / "c++ talks"
    place.mkdir()
    (place / "a.jsonl").touch()
    (place / "b.jsonl:3").touch()
    given = f"{place}/a.jsonl:0.5+{place}/b.jsonl:3+train:2+other+train"
    assert split_weights(given) == {f"{place}/a.jsonl": 0.5, f"{place}/b.jsonl:3": 1, "train": 3, "other": 1}
    with pytest.raises(UserError, match="split 'train:0': expected a weight above 0"):
        split_weights("train:0")


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_the_recipe_prints_each_mission_with_each_state(world, tmp_path):
    data = tmp_path / "digits/recordings"
    data.mkdir(parents=True)
    for i, (path, _) in enumerate(world.utterances[:12]):
        digit, speaker, number = i % 3, ("ann", "bob")[i % 2], 4 + i // 6  # the official test is number < 5
        (data / f"{digit}_{speaker}_{number}.wav").symlink_to(path)
    settings = {
        "data_dir": data.parent,
        "encoder": world.encoder,
        "load_model": world.model,
        "proj_dir": tmp_path / "out",
    }
    settings |= {"epoch_count": 1, "adapter_hidden": 16, "accelerator": "cpu", "VIRTUAL_ENV": sys.prefix}
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    command = ["sh", str(Path(__file__).parents[1] / "demo/recipes/state-at-work.sh")]
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "training on" not in done.stderr, "trained twice"
    found = json.loads((tmp_path / "out/accuracies.json").read_text())
    five = ["english", "chinese", "next", "speaker", "german"]
    expected = {f"{state}, {name}" for state in (*five, "zero") for name in five} - {"zero, german"}
    assert found.keys() == expected
    assert all(0 <= share <= 1 for share in found.values())
    # 2 layers x 2 x 32 x 32 floats; (160 + 1) x 16 + (16 + 1) x 64
    assert "a state is 16 kB, the adapter 15 kB" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out/data/train.jsonl").read_text().splitlines()]
    assert {(row["mission"], row["text"]) for row in rows if "0_ann" in row["audio"]} == {
        ("label/english", "zero"), ("label/chinese", "零"), ("label/next", "one"), ("label/speaker", "ann")
    }  # fmt: skip
