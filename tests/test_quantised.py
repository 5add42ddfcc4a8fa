"""A language model kept in int8 or nf4: what packing keeps, products and gradients, loading, training."""

import re
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F

from rwkv_speech import lm
from rwkv_speech.errors import UserError
from rwkv_speech.lm import quantised, step, wkv
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.quantised import BLOCK, NF4, QuantisedLinear, dequantise, quantise
from rwkv_speech.lm.weights import read_weights
from rwkv_speech.terminal import printable
from tests.tiny import answers, at_door, do, last, losses, missions

pytestmark = pytest.mark.usefixtures("voiced")

QUANT = pytest.mark.parametrize("quant", ["int8", "nf4"])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight, quant):
    layer = QuantisedLinear(*reversed(weight.shape), quant)
    layer.packed.data, layer.scale.data = quantise(weight, quant)
    return layer


# --- packing ---------------------------------------------------------------------------------------------------------


def test_the_codes_are_the_published_quantiles():
    """QLoRA, appendix E: 8 quantiles above and 7 below, from 1 - (1/30 + 1/32) / 2, over the largest of them."""
    quantile = NormalDist().inv_cdf
    end = 1 - (1 / 30 + 1 / 32) / 2

    def side(count):
        return [quantile(end + (0.5 - end) * i / count) for i in range(count)]

    codes = sorted([*side(8), 0.0, *(-x for x in side(7))])
    assert pytest.approx([x / codes[-1] for x in codes], abs=1e-6) == NF4


def test_int8_by_hand():
    packed, scale = quantise(torch.tensor([[2.54, -1.27, 0.009, 0.0], [0.0, 0.0, 0.0, 0.0]]), "int8")
    assert scale.tolist() == pytest.approx([0.02, 0.0])
    assert packed.tolist() == [[127, -64, 0, 0], [0, 0, 0, 0]]  # -63.5 goes to the even one
    assert dequantise(packed, scale, 4)[0].tolist() == pytest.approx([2.54, -1.28, 0, 0])


def test_nf4_by_hand():
    """The nearest code of each weight over the largest of its 64; two to a byte, the first in the upper half."""
    row = torch.zeros(1, 66)
    row[0, :5] = torch.tensor([2.0, -2.0, 0.9, 0.31, 0.5])  # 1, -1, 0.45, 0.155, 0.25: codes 15, 0, 12, 9, 10
    row[0, 64] = -3.0
    packed, scale = quantise(row, "nf4")
    assert (packed.shape, packed.dtype) == ((1, 64), torch.uint8)
    assert packed[0, :4].tolist() == [0xF0, 0xC9, 0xA7, 0x77]
    assert packed[0, 32:].tolist() == [0x07, *[0x77] * 31]
    assert scale.tolist() == [[2.0, 3.0]]
    expected = [2.0, -2.0, 2 * 0.44070983, 2 * 0.16093020, 2 * 0.24611230, 0.0]
    assert dequantise(packed, scale, 66)[0, :6].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@QUANT
def test_a_weight_moves_by_half_a_gap_at_most(quant, dtype, monkeypatch):
    """int8: the largest of the row / 127 / 2; nf4: the largest of the block * (1 - 0.69619) / 2, or less."""
    monkeypatch.setattr(quantised, "PACKED_AT_ONCE", 1000)  # several parts, the last one smaller
    weight = normal(33, 192).to(dtype)
    parts = weight.float().view(33, -1, 192 if quant == "int8" else BLOCK)
    moved = (dequantise(*quantise(weight, quant), 192).view_as(parts) - parts).abs() / parts.abs().amax(2, keepdim=True)
    bound = 1 / 254 if quant == "int8" else 0.30380720 / 2
    assert 0.9 * bound < moved.max() <= bound * (1 + 1e-5)
    # Of numbers evenly spread between codes that are 2 / 15 apart, as nf4's are on average, the deviation is 0.038.
    assert moved.square().mean().sqrt() < (0.6 * bound if quant == "int8" else 0.038)


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, 7, 64])
@QUANT
def test_a_product_of_few_rows_reads_the_packed_weights(quant, rows, dtype):
    if wkv.backend("cpu").name != "cpu":
        pytest.skip("no C++ compiler")
    for inputs in (192, 203):  # whole blocks, or not
        packed, scale = quantise(normal(37, inputs), quant)
        x = normal(rows, inputs, seed=1).to(dtype)
        got = torch.ops.rwkv_speech_cpu.few_rows_packed(x, packed, scale)
        want = x.double() @ dequantise(packed, scale, inputs).double().T
        assert (got - want).norm() <= (1e-6 if dtype == torch.float32 else 3e-3) * want.norm()
        alone = torch.cat([torch.ops.rwkv_speech_cpu.few_rows_packed(row[None], packed, scale) for row in x])
        assert torch.equal(got, alone), "a batch must give to the last bit what one row gives alone"
        weights = torch.ops.rwkv_speech_cpu.few_rows_packed(torch.eye(inputs), packed, scale)
        assert torch.equal(weights.T, dequantise(packed, scale, inputs))


def test_few_rows_that_do_not_fit_are_refused():
    if wkv.backend("cpu").name != "cpu":
        pytest.skip("no C++ compiler")
    for quant in ("int8", "nf4"):
        packed, scale = quantise(normal(8, 128), quant)
        for x, p, s in (
            (normal(1, 192), packed, scale),
            (normal(1, 128), packed[:4].T, scale),
            (normal(1, 128), packed, scale[:2]),
        ):
            with pytest.raises(RuntimeError, match="does not fit"):
                torch.ops.rwkv_speech_cpu.few_rows_packed(x, p, s)


@pytest.mark.parametrize("rows", [5, 70])
@QUANT
def test_the_gradient_is_that_of_a_product_with_the_unpacked_weights(quant, rows, monkeypatch):
    monkeypatch.setattr(quantised, "UNPACKED_AT_ONCE", 1000)  # parts of 5 rows, the last of 2
    layer = layer_of(normal(37, 192), quant)
    weight = layer.weight
    x = normal(2, rows, 192, seed=1).requires_grad_()
    for _ in range(2):  # also after an evaluation
        (got,) = torch.autograd.grad(layer(x).square().sum(), x)
        (want,) = torch.autograd.grad(F.linear(x, weight).square().sum(), x)
        assert (got - want).norm() < 1e-6 * want.norm()
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), F.linear(x, weight), rtol=1e-5, atol=1e-4)
    assert not any(p.requires_grad for p in layer.parameters())


def test_only_the_packed_form_is_kept_for_the_backward_pass():
    layer, kept = layer_of(normal(256, 128), "nf4"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(normal(100, 128).requires_grad_())
    assert sum(x.nbytes for x in kept) == 256 * (64 + 2 * 4)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[6, 7], ids=["rwkv6", "rwkv7"])
def files(request, tmp_path_factory):
    """A model's file, and that of the same model with the weights that a quant leaves: function of it."""
    sizes = official_sizes(generation=request.param, n_layer=2, n_embd=128, vocab_size=257)
    tensors = random_weights(sizes, seed=1, time_state=True)
    folder = tmp_path_factory.mktemp("models")
    torch.save(tensors, folder / "model.pth")

    def replaced(quant):
        def left(name, x):
            parts = name.split(".")
            if parts[-1] != "weight" or x.dim() != 2 or parts[-2] == "emb":
                return x
            return dequantise(*quantise(x, "int8" if parts[-2] == "head" else quant), x.shape[1])

        torch.save({name: left(name, x) for name, x in tensors.items()}, folder / f"{quant}.pth")
        return folder / f"{quant}.pth"

    return folder / "model.pth", replaced


@QUANT
def test_a_model_is_that_of_the_unpacked_weights(files, quant, monkeypatch):
    """All positions at once with the gradient of the state, and token by token as one call and by the formulas."""
    path, replaced = files
    packed, plain = lm.load(path, quant=quant), lm.load(replaced(quant))
    assert (packed.quant, plain.quant) == (quant, None)
    tokens = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(0))

    def run(model, checkpointing):
        model.checkpointing = checkpointing
        state = model.time_states[0].requires_grad_()
        logits = model.logits(model(tokens)[0])
        return logits.detach(), *torch.autograd.grad(logits.square().mean(), state)

    expected = run(plain, False)
    for checkpointing in (False, True):
        for got, want in zip(run(packed, checkpointing), expected, strict=True):
            assert (got - want).norm() < 1e-5 * want.norm()

    @torch.inference_mode()
    def decode(model):
        found, state = [], None
        for token in tokens.T:
            hidden, state = model(token[:, None], state)
            found.append(model.logits(hidden))
        return torch.cat(found, 1)

    with torch.inference_mode():
        at_once = step.takes(normal(2, 1, 128), packed.time_states[0], packed.ln_out.weight)
    assert at_once or wkv.backend("cpu").name != "cpu", "the case is void"
    torch.testing.assert_close(decode(packed), expected[0], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(step, "takes", lambda *_: False)
    torch.testing.assert_close(decode(packed), expected[0], rtol=1e-4, atol=1e-4)


@QUANT
def test_in_bf16_too(files, quant):
    path, replaced = files
    packed, exact = lm.load(path, quant=quant, dtype=torch.bfloat16), lm.load(replaced(quant))
    tokens = torch.randint(1, 257, (1, 80), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for n in (1, 80):
            got, want = (m.logits(m(tokens[:, :n])[0]) for m in (packed, exact))
            assert got.dtype == torch.bfloat16
            assert (got - want).norm() < 0.05 * want.norm()


@QUANT
def test_loading_takes_the_memory_of_the_result_and_little_more(tmp_path, quant):
    """What torch allocates, by its own account: the file is mapped, and its matrices are packed part by part."""
    sizes = official_sizes(generation=6, n_layer=4, n_embd=512, vocab_size=4096)
    torch.save(random_weights(sizes, seed=0, dtype=torch.bfloat16), tmp_path / "model.pth")
    whole = sum(x.nbytes for x in read_weights(tmp_path / "model.pth")[1].values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = lm.load(tmp_path / "model.pth", quant=quant)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    mapped = re.findall(r"model\.pth\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert sum(map(int, mapped)) < 1024, "of the file, it holds what nobody reads any more"
    size = sum(p.nbytes for p in model.parameters())
    blocks, head, states = 4 * 13 * 512**2, 4096 * 512, 4 * 512 * 64 * 4
    rest = whole - 2 * (blocks + head) + states
    scales = 4 * (4 * (5 * 512 + 512 * 3.5 + 512 + 512) + 4096) if quant == "int8" else blocks / BLOCK * 4 + 4 * 4096
    assert size == pytest.approx(blocks * (1 if quant == "int8" else 0.5) + head + rest + scales)
    size -= 2 * head  # the embedding stays in the file
    file = (tmp_path / "model.pth").stat().st_size  # counted whole, where it is mapped: the one that stays, and before
    assert now - file == pytest.approx(size, rel=0.01)
    peak -= 2 * file
    assert peak < size + 2 * head, f"{peak - size:,} bytes more than the result: more than the largest matrix"


def test_no_such_quant(files):
    with pytest.raises(ValueError, match="quant 'int4': expected int8 or nf4"):
        lm.load(files[0], quant="int4")


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    project = tmp_path_factory.mktemp("trained")
    flags = ["--quant=nf4", "--epoch_count=10", "--epoch_steps=4", "--lr_init=5e-3", "--state_lr_scale=20"]
    assert do("train", world, project, *flags) == 0
    return project


def test_training_learns_and_the_mission_file_says_what_it_is_for(trained, world, caplog, tmp_path):
    curve = losses(trained)
    assert sum(curve[i] for i in range(37, 41)) / 4 < sum(curve[i] for i in range(1, 5)) / 4 - 0.7
    assert missions(trained)["rwkv-adapter-40.pth"][1]["quant"] == "nf4"
    model = world.speech_rwkv(adapter=trained / "rwkv-adapter-40.pth")
    assert model.language_model.quant == "nf4", "as the mission file says"
    caplog.set_level("INFO", "rwkv_speech")
    full = world.speech_rwkv(adapter=trained / "rwkv-adapter-40.pth", quant="none")
    assert full.language_model.quant is None
    assert "rwkv-adapter-40.pth was trained beside a language model with the quant nf4, not none" in caplog.text
    waves = [normal(8000, seed=i) for i in range(2)]
    with torch.no_grad():
        assert abs(model.loss(waves, ["ab", "cd"]) - full.loss(waves, ["ab", "cd"])) > 1e-4
    assert "quant" not in full.describe()


def test_evaluation_and_prediction_keep_the_model_as_it_was_trained(trained, world, monkeypatch, capsys):
    path, _ = world.utterances[0]
    model = world.speech_rwkv(adapter=trained / "rwkv-adapter-40.pth")
    expected = answers(model, [path], max_new_tokens=20)
    flags = ["--op=predict", f"--proj_dir={trained}", "--max_new_tokens=20", *world.flags[:1], "--accelerator=cpu"]
    status, printed = at_door(monkeypatch, capsys, *flags, "--file_path", path)
    assert (status, printed.out) == (0, printable(" ".join(expected[0].split())) + "\n")
    loaded = []

    def quantise_layers(model, quant):
        loaded.append(quant)
        return quantised.quantise_layers(model, quant)

    monkeypatch.setattr("rwkv_speech.lm.language_model.quantise_layers", quantise_layers)
    for asked in ([], ["--quant=int8"], ["--quant=none"]):
        assert do("eval", world, trained, "--max_new_tokens=4", "--eval_bsz=24", *asked) == 0
    assert loaded == ["nf4", "int8"]


def test_with_another_quant_it_is_another_run(world, tmp_path, monkeypatch, caplog):
    from rwkv_speech.engine.module import TrainingModule

    plain = TrainingModule.training_step

    def fail(self, batch, index):
        if self.global_step == 2:
            raise InterruptedError
        return plain(self, batch, index)

    flags = ["--epoch_count=2", "--epoch_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", fail)
        with pytest.raises(InterruptedError):
            do("train", world, tmp_path, "--quant=int8", *flags)
    caplog.set_level("INFO", "rwkv_speech")
    do("train", world, tmp_path, "--quant=int8", *flags)
    assert "going on with the unfinished run 1" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", fail)
        with pytest.raises(InterruptedError):
            do("train", world, tmp_path, "--quant=int8", *flags)
    do("train", world, tmp_path, "--quant=nf4", *flags)
    assert "had other load_model_weights, quant; this is run 3" in caplog.text
    assert last(tmp_path)


def test_what_makes_no_sense_is_refused(trained, world, tmp_path, monkeypatch, capsys):
    status, printed = at_door(monkeypatch, capsys, *world.flags, "--quant=int4")
    assert status == 2
    assert "--quant: invalid choice: 'int4' (choose from" in printed.err
    with pytest.raises(UserError, match="quant 'int4': expected none, int8 or nf4"):
        world.speech_rwkv(quant="int4")
    file = tmp_path / "rwkv-adapter-1.pth"
    torch.save(missions(trained)["rwkv-adapter-40.pth"][0], file)
    for said, message in (
        ("3", "quant is '3', expected of type str"),
        ('"int4"', "the quant 'int4', which is not known"),
    ):
        file.with_suffix(".json").write_text(f'{{"quant": {said}}}')
        with pytest.raises(UserError, match=message):
            world.speech_rwkv(adapter=file)
    file.with_suffix(".json").write_text('{"mission": "translate"}')
    both = [trained / "rwkv-adapter-40.pth", file]
    with pytest.raises(UserError, match=r"different quants .*: nf4, .*: none\): name one by --quant"):
        world.speech_rwkv(adapter=both)
    assert world.speech_rwkv(adapter=both, quant="int8").language_model.quant == "int8"
