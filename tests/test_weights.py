"""Reading files of RWKV-6 and RWKV-7: sizes from tensors, every kind of broken file, memory mapping, new weights."""

import os
import re
import resource
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rwkv_speech import lm
from rwkv_speech.lm.initialise import fresh_weights, official_sizes, random_weights
from rwkv_speech.lm.weights import ModelSizes, expected_shapes, infer_sizes, read_weights
from rwkv_speech.tensors import WeightsError

# Every size differs from every other, so that none can be taken for another.
SIZES = ModelSizes(n_layer=4, n_embd=96, n_head=3, head_size=32, dim_ffn=224, dim_mix=10, dim_decay=20, vocab_size=300)
SIZES7 = ModelSizes(
    generation=7,
    n_layer=4,
    n_embd=96,
    n_head=3,
    head_size=32,
    dim_ffn=224,
    dim_decay=10,
    dim_rate=20,
    dim_value=30,
    dim_gate=40,
    vocab_size=300,
)
LARGE_SIZES = official_sizes(n_layer=1, n_embd=256, vocab_size=65536)  # 140 MB


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return random_weights(SIZES, seed=1, time_state=True)


def save(tensors: dict, path: Path) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def message_of(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("of", [SIZES, SIZES7], ids=["rwkv6", "rwkv7"])
def test_reads_sizes_and_tensors_as_written(tmp_path, of, suffix, dtype):
    tensors = random_weights(of, seed=1, dtype=dtype, time_state=True)
    sizes, read = read_weights(save(tensors, tmp_path / f"model{suffix}"))
    assert sizes == of
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor), name


def test_names_and_shapes_are_those_of_the_official_code():
    """As written in the design of the official files, by hand for one small model."""
    shapes = expected_shapes(SIZES)
    assert shapes["emb.weight"] == shapes["head.weight"] == (300, 96)
    in_block = {
        "ln1.weight": (96,),
        "att.time_maa_x": (1, 1, 96),
        "att.time_maa_w1": (96, 50),
        "att.time_maa_w2": (5, 10, 96),
        "att.time_decay": (1, 1, 96),
        "att.time_decay_w1": (96, 20),
        "att.time_decay_w2": (20, 96),
        "att.time_faaaa": (3, 32),
        "att.gate.weight": (96, 96),
        "att.ln_x.bias": (96,),
        "ffn.time_maa_r": (1, 1, 96),
        "ffn.key.weight": (224, 96),
        "ffn.receptance.weight": (96, 96),
        "ffn.value.weight": (96, 224),
    }
    for name, shape in in_block.items():
        assert shapes[f"blocks.3.{name}"] == shape
    # 6 outside the blocks; in each 6 of norms, 8 token shifts, 4 low-rank factors, decay, bonus, 8 matrices.
    assert len(shapes) == 6 + 4 * (6 + 8 + 4 + 2 + 8)
    assert not any("time_state" in name for name in shapes)


def test_names_and_shapes_of_rwkv7_are_those_of_the_official_code():
    shapes = expected_shapes(SIZES7)
    in_block = {
        "att.x_a": (1, 1, 96),
        "att.w1": (96, 10),
        "att.w2": (10, 96),
        "att.a0": (1, 1, 96),
        "att.a1": (96, 20),
        "att.v1": (96, 30),
        "att.v2": (30, 96),
        "att.g2": (40, 96),
        "att.k_k": (1, 1, 96),
        "att.r_k": (3, 32),
        "att.output.weight": (96, 96),
        "ffn.x_k": (1, 1, 96),
        "ffn.key.weight": (224, 96),
        "ffn.value.weight": (96, 224),
    }
    for name, shape in in_block.items():
        assert shapes[f"blocks.3.{name}"] == shape
    # 6 outside the blocks; in each 6 of norms, 7 token shifts, w, a, v of 3 and g of 2, k_k, k_a, r_k, and 6 matrices.
    assert len(shapes) == 6 + 4 * (6 + 7 + 11 + 3 + 6) - 3  # no v0, v1, v2 in the first
    assert "blocks.0.att.v1" not in shapes


@pytest.mark.parametrize(
    ("generation", "n_layer", "n_embd", "billions"),
    [
        (6, 24, 2048, 1.6),
        (6, 32, 2560, 3.1),
        (6, 32, 4096, 7.6),
        (6, 61, 4096, 14.1),
        (7, 12, 768, 0.191),
        (7, 24, 1024, 0.4508),
        (7, 24, 2048, 1.527),
        (7, 32, 2560, 2.948),
        (7, 32, 4096, 7.199),
        (7, 61, 4096, 13.27),
    ],
)
def test_parameter_counts_of_the_official_models(generation, n_layer, n_embd, billions):
    """The counts that the model cards of the official files state."""
    n_params = official_sizes(generation=generation, n_layer=n_layer, n_embd=n_embd).n_params
    assert n_params / 1e9 == pytest.approx(billions, abs=0.06 if generation == 6 else 1e-3 * billions)


def test_rwkv_package_reads_our_files(tmp_path):
    from rwkv.model import RWKV

    sizes = official_sizes(n_layer=2, n_embd=128, vocab_size=300)
    torch.save(random_weights(sizes, seed=1, time_state=True), tmp_path / "model.pth")
    logits, state = RWKV(model=str(tmp_path / "model"), strategy="cpu fp32", verbose=False).forward([1, 2, 3], None)
    assert logits.shape == (300,)
    assert logits.std() > 0.1
    assert len(state) == 3 * 2


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_is_memory_mapped_and_leaves_the_file_alone(tmp_path, suffix):
    def resident() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from Linux's /proc")
    path = save(random_weights(LARGE_SIZES, seed=1), tmp_path / f"model{suffix}")
    size, before = path.stat().st_size, resident()
    _, tensors = read_weights(path)
    assert resident() - before < 0.2 * size  # nothing read yet
    total = sum(tensor.sum() for tensor in tensors.values())
    assert total.isfinite()
    assert resident() - before < 1.15 * size

    first = tensors["emb.weight"][0, 0].item()
    tensors["emb.weight"].zero_()
    assert read_weights(path)[1]["emb.weight"][0, 0] == first != 0


def test_reads_the_form_of_torch_before_1_6(tmp_path, tensors):
    torch.save(tensors, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    sizes, read = read_weights(tmp_path / "model.pth")
    assert sizes == SIZES
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_state_is_optional(tmp_path, tensors):
    for name in [name for name in tensors if "time_state" in name]:
        del tensors[name]
    sizes, read = read_weights(save(tensors, tmp_path / "model.pth"))
    assert sizes == SIZES
    assert not any("time_state" in name for name in read)


def test_leading_ones_may_differ(tmp_path, tensors):
    flat = {name: tensor.squeeze() for name, tensor in tensors.items()}
    flat["blocks.0.ln1.weight"] = flat["blocks.0.ln1.weight"][None]
    sizes, read = read_weights(save(flat, tmp_path / "model.pth"))
    assert sizes == SIZES
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == expected_shapes(SIZES, time_state=True)


def test_parameters_come_without_gradient(tmp_path, tensors):
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    _, read = read_weights(save(parameters, tmp_path / "model.pth"))
    assert not any(tensor.requires_grad for tensor in read.values())


def test_one_error_lists_all_that_is_wrong(tmp_path, tensors):
    del tensors["head.weight"], tensors["blocks.2.att.gate.weight"], tensors["blocks.1.att.time_state"]
    for layer in range(4):
        del tensors[f"blocks.{layer}.ffn.value.weight"]
    tensors["emb.weight"] = tensors["emb.weight"][:, :90]
    tensors["blocks.3.att.time_faaaa"] = torch.zeros(96)
    tensors["blocks.0.att.time_state"] = torch.zeros(3, 32, 16)
    tensors["blocks.0.att.key.weight"] = torch.zeros(96, 96, dtype=torch.int8)
    tensors["blocks.0.att.gate_w1"] = torch.zeros(96, 8)
    message = message_of(save(tensors, tmp_path / "model.pth"))
    for part in (
        "with 4 layers",
        "missing: head.weight, blocks.*.ffn.value.weight, blocks.1.att.time_state, blocks.2.att.gate.weight;",
        "emb.weight is (300, 90), expected (300, 96)",
        "blocks.3.att.time_faaaa is (96), expected (3, 32)",
        "blocks.0.att.time_state is (3, 32, 16), expected (3, 32, 32)",
        "blocks.0.att.key.weight holds torch.int8",
        "unknown: blocks.0.att.gate_w1;",
    ):
        assert part in message
    assert message.count(" is (") == 3  # and nothing that is right


def test_sizes_that_nothing_tells_are_named_by_their_symbol(tensors):
    for layer in range(4):
        tensors[f"blocks.{layer}.att.time_faaaa"] = torch.zeros(96)
    with pytest.raises(WeightsError, match=r"blocks\.\*\.att\.time_faaaa is \(96\), expected \(H, N\)"):
        infer_sizes(tensors)


def test_heads_must_make_the_width(tensors):
    for layer in range(4):
        tensors[f"blocks.{layer}.att.time_faaaa"] = torch.zeros(2, 32)
        tensors[f"blocks.{layer}.att.time_state"] = torch.zeros(2, 32, 32)
    with pytest.raises(WeightsError, match="2 heads of 32, which do not make the width 96"):
        infer_sizes(tensors)


@pytest.mark.parametrize("shape", [(1, 1, 96), (96, 7), (5,)])
def test_what_the_first_layer_of_an_rwkv7_has_too_much_is_left_out(tmp_path, shape):
    tensors = random_weights(SIZES7, seed=1)
    extra = {f"blocks.0.att.v{i}": torch.zeros(shape) for i in range(3)}
    sizes, read = read_weights(save(tensors | extra, tmp_path / "model.pth"))
    assert sizes == SIZES7
    assert read.keys() == tensors.keys()


def test_errors_of_an_rwkv7(tmp_path):
    tensors = random_weights(SIZES7, seed=1)
    for layer in range(1, 4):
        del tensors[f"blocks.{layer}.att.v1"]
    del tensors["blocks.0.att.g1"]
    tensors["blocks.2.att.a1"] = torch.zeros(96, 7)
    tensors["blocks.1.att.gate.weight"] = torch.zeros(96, 96)
    message = message_of(save(tensors, tmp_path / "model.pth"))
    assert "not the tensors of a whole RWKV-7 (x070) with 4 layers" in message
    assert "missing: blocks.0.att.g1, " in message
    assert "blocks.1.att.v1" in message
    assert "blocks.2.att.a1 is (96, 7), expected (96, 20)" in message
    assert "unknown: blocks.1.att.gate.weight" in message


# The tensors of the time mix as each generation's own code names them (BlinkDL/RWKV-LM: v4neo, v5, v7).
RWKV4 = ["time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r", "key.weight", "output.weight"]
RWKV5_0 = [*RWKV4, "ln_x.weight", "ln_x.bias"]
RWKV5_2 = ["time_decay", "time_faaaa", "time_mix_k", "time_mix_g", "gate.weight", "ln_x.weight", "ln_x.bias"]
RWKV7A = ["ffn.s_emb.weight", "ffn.s_emb_x.weight", "ffn.s0", "ffn.s1", "ffn.s2"]
RWKV7B = [*RWKV7A, "qkv.k1", "qkv.qq.weight", "qkv.x_q"]


@pytest.mark.parametrize(
    ("generation", "names"),
    [("4", RWKV4), ("5", RWKV5_0), ("5", RWKV5_2)],
    ids=["v4", "v5.0", "v5.2"],
)
def test_other_generations_are_named(tmp_path, generation, names):
    tensors = {f"blocks.{layer}.att.{name}": torch.zeros(8) for layer in range(2) for name in names}
    tensors["emb.weight"] = tensors["head.weight"] = torch.zeros(10, 8)
    message = message_of(save(tensors, tmp_path / "model.pth"))
    assert f"look like RWKV-{generation}; expected RWKV-6 (x060) or RWKV-7 (x070)" in message


@pytest.mark.parametrize(("generation", "names"), [("7a", RWKV7A), ("7b", RWKV7B)])
def test_variations_of_rwkv7_are_named(tmp_path, generation, names):
    tensors = random_weights(SIZES7, seed=1)
    tensors |= {f"blocks.{layer}.{name}": torch.zeros(8) for layer in range(4) for name in names}
    assert f"look like RWKV-{generation}; expected RWKV-6" in message_of(save(tensors, tmp_path / "model.pth"))


def test_no_rwkv_at_all(tmp_path):
    tensors = {f"model.layers.{layer}.self_attn.q_proj.weight": torch.zeros(8, 8) for layer in range(6)}
    message = message_of(save(tensors, tmp_path / "model.safetensors"))
    assert "no RWKV of generation 4 to 7" in message
    assert "model.layers.0.self_attn.q_proj.weight" in message
    assert "and 2 more" in message


def test_missing_file_folder_and_empty_file(tmp_path):
    assert "does not exist" in message_of(tmp_path / "none.pth")
    assert "is a folder" in message_of(tmp_path)
    for name in ("empty.pth", "empty.safetensors"):
        (tmp_path / name).touch()
    assert "is empty" in message_of(tmp_path / "empty.pth")
    assert "truncated" in message_of(tmp_path / "empty.safetensors")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_at_any_length(tmp_path, kind):
    tensors = {"emb.weight": torch.zeros(20), "head.weight": torch.zeros(20)}
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth")
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in range(4, len(whole), 7):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings(action="ignore"):
            assert re.search("truncated|damaged", message_of(path)), length


def repack(path: Path, compression: int, **more: bytes) -> Path:
    """As any zip program packs what it has unpacked; `more` becomes further parts."""
    again = path.with_name(f"again-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", compression) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
        for name, content in more.items():
            new.writestr(f"{old.namelist()[0].partition('/')[0]}/data/{name}", content)
    return again


def test_packed_again_without_compression(tmp_path, tensors):
    _, read = read_weights(repack(save(tensors, tmp_path / "model.pth"), zipfile.ZIP_STORED))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_compressed(tmp_path, tensors):
    path = save(tensors, tmp_path / "model.pth")
    assert "is compressed" in message_of(repack(path, zipfile.ZIP_DEFLATED))
    assert "is compressed" in message_of(repack(path, zipfile.ZIP_DEFLATED, bomb=bytes(100_000_000)))


@pytest.mark.parametrize("of", [SIZES, SIZES7], ids=["rwkv6", "rwkv7"])
def test_transposed_matrices_compute_the_same(tmp_path, of):
    tensors = random_weights(of, seed=1)
    turned = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in tensors.items()}
    assert not turned["head.weight"].is_contiguous()
    plain, other = (lm.load(save(x, tmp_path / f"{i}.pth")) for i, x in enumerate((tensors, turned)))
    with torch.no_grad():
        for ids in (torch.tensor([[5]]), torch.arange(40)[None]):
            assert torch.equal(plain.logits(plain(ids)[0]), other.logits(other(ids)[0]))


def test_what_is_stored_in_fp64_is_computed_in_fp32(tmp_path, tensors):
    model = lm.load(save({name: x.double() for name, x in tensors.items()}, tmp_path / "model.pth"))
    assert model(torch.tensor([[5]]))[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("stranger", "message"),
    [
        ({"blocks.99999999.ln1.weight": torch.zeros(96)}, "with 5 layers; missing: .*unknown: blocks.99999999.ln1"),
        ({f"blocks.{'9' * 5000}.ln1.weight": torch.zeros(96)}, "with 5 layers; missing: .*unknown: blocks.9999"),
        ({"emb.weight": torch.zeros(1).expand(10**9, 96)}, "384,0.* by repetition"),
        ({"blocks.0.ln1.weight": torch.zeros(96).to_sparse()}, "without numbers .blocks.0.ln1.weight"),
        ({"blocks.0.ln1.weight": torch.empty(96, device="meta")}, "without numbers .blocks.0.ln1.weight"),
        ({"blocks.0.ln1.weight": torch.zeros(96).to(torch.float8_e4m3fn)}, "holds torch.float8_e4m3fn"),
    ],
    ids=["layer-number", "longer-than-int", "stride-0", "sparse", "meta", "float8"],
)
def test_what_would_ask_for_all_memory_or_computes_nothing(tmp_path, tensors, stranger, message):
    path = save(tensors | stranger, tmp_path / "model.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert re.search(message, message_of(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_text_with_the_name_of_a_model(tmp_path):
    """What a clone without its large files leaves."""
    path = tmp_path / "model.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "starts with b'version https://'; expected" in message_of(path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, (str(Harmful.target),)


@pytest.mark.parametrize("new_form", [True, False], ids=["zip", "legacy"])
def test_objects_are_refused_and_run_nothing(tmp_path, monkeypatch, new_form):
    monkeypatch.setattr(Harmful, "target", tmp_path / "run", raising=False)
    torch.save({"emb.weight": Harmful()}, tmp_path / "model.pth", _use_new_zipfile_serialization=new_form)
    message = message_of(tmp_path / "model.pth")
    assert "could run code" in message
    assert "weights_only" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([torch.zeros(3)], "holds a list"),
        ({0: torch.zeros(3)}, "more than named tensors (0)"),
        ({}, "its tensors (none) look like no RWKV"),
        (torch.zeros(3), "holds a Tensor"),
        (
            {"state_dict": {"emb.weight": torch.zeros(3)}, "epoch": 3},
            "more than named tensors (state_dict, epoch)",
        ),
    ],
    ids=["list", "numbered", "empty", "tensor", "checkpoint"],
)
def test_no_dict_of_tensors(tmp_path, content, what):
    torch.save(content, tmp_path / "model.pth")
    assert what in message_of(tmp_path / "model.pth")


def test_unreadable_file(tmp_path, tensors, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = save(tensors, tmp_path / "model.pth")
    monkeypatch.setattr(Path, "open", refuse)
    assert "can't be read (Permission denied)" in message_of(path)


@pytest.mark.parametrize("make", [fresh_weights, random_weights], ids=["fresh", "random"])
@pytest.mark.parametrize("sizes", [SIZES, SIZES7], ids=["rwkv6", "rwkv7"])
def test_new_weights_have_the_official_form_and_follow_the_seed(make, sizes):
    weights = make(sizes, seed=3, dtype=torch.bfloat16)
    assert infer_sizes(weights) == sizes
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected_shapes(sizes)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    again, other = make(sizes, seed=3, dtype=torch.bfloat16), make(sizes, seed=4, dtype=torch.bfloat16)
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert not torch.equal(other["emb.weight"], weights["emb.weight"])


@pytest.mark.parametrize("n_layer", [1, 2])
def test_a_model_of_the_official_rule_is_read_back(n_layer):
    sizes = official_sizes(generation=7, n_layer=n_layer, n_embd=128, vocab_size=257)
    assert infer_sizes(fresh_weights(sizes, seed=0)) == sizes


@pytest.mark.parametrize("generation", [6, 7])
def test_random_weights_are_random_everywhere(generation):
    sizes = official_sizes(generation=generation, n_layer=2, n_embd=256, vocab_size=300)
    weights = random_weights(sizes, seed=1, time_state=True)
    for name, tensor in weights.items():
        assert tensor.std() > 1e-3, name
        assert (tensor != 0).float().mean() > 0.99, name
    if generation == 6:
        decay = torch.exp(-torch.exp(weights["blocks.1.att.time_decay"]))
        assert decay.min() < 0.1
    else:
        decay = torch.exp(-torch.exp(torch.tensor(-0.5)) * torch.sigmoid(weights["blocks.1.att.w0"]))
        assert decay.min() < 0.57
    assert decay.max() > 0.99
    assert decay.std() > 0.1


def test_fresh_weights_of_rwkv7_by_hand():
    """Values worked by hand from the official scheme, for 4 blocks of width 96 and heads of 32."""
    weights = fresh_weights(SIZES7, seed=1)

    def value(name: str, index: int) -> float:
        return weights[name].flatten()[index].item()

    assert value("blocks.0.att.x_r", 24) == pytest.approx(1 - 0.25**0.2)
    assert value("blocks.2.att.x_w", 24) == pytest.approx(1 - 0.25**0.45)
    assert value("blocks.1.att.x_v", 48) == pytest.approx(1 - 0.5**0.525)
    assert value("blocks.2.ffn.x_k", 24) == pytest.approx(1 - 0.25 ** (1 / 16))
    assert value("blocks.0.att.w0", 0) == pytest.approx(-5.5 - 2.5)
    assert value("blocks.0.att.w0", 95) == pytest.approx(0.5 + 2.5)
    assert value("blocks.3.att.w0", 19) == pytest.approx(-5.5 + 6 * 0.2**2 + 2.5 * (7 / 31) ** 2)  # 19/95; 2*19/31-1
    assert value("blocks.1.att.a0", 0) == pytest.approx(-0.19 - 0.3 - 0.2)
    assert value("blocks.1.att.v0", 95) == pytest.approx(0.73 - 0.2)
    assert value("blocks.1.att.k_k", 0) == pytest.approx(0.71 + 0.05)
    assert value("blocks.1.att.k_a", 5) == pytest.approx(1.02)
    assert value("blocks.1.att.r_k", 5) == pytest.approx(-0.04)
    assert value("blocks.0.att.ln_x.weight", 0) == pytest.approx(0.25**0.7)
    for name in ("att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1", "att.g1", "ln1.bias"):
        assert not weights[f"blocks.1.{name}"].any(), name
    for name in ("w2", "a2", "v2", "g2"):
        factor = weights[f"blocks.1.att.{name}"]
        torch.testing.assert_close(factor @ factor.T, 0.01 * torch.eye(len(factor)), atol=1e-6, rtol=1e-5, msg=name)


def test_fresh_weights_by_hand():
    """Values worked by hand from the official scheme, for 4 blocks of width 96."""
    weights = fresh_weights(SIZES, seed=1)

    def value(name: str, index: int) -> float:
        return weights[name].flatten()[index].item()

    assert value("blocks.0.att.time_maa_x", 24) == pytest.approx(1 - 0.25)
    assert value("blocks.2.att.time_maa_k", 24) == pytest.approx(1 - 0.25**0.5)
    assert value("blocks.0.att.time_maa_g", 24) == pytest.approx(1 - 0.5)
    assert value("blocks.3.att.time_maa_v", 48) == pytest.approx(1 - 0.5**0.25 - 0.3)
    assert [value("blocks.0.att.time_decay", i) for i in (0, 95)] == [-6, -1]
    assert value("blocks.3.att.time_decay", 19) == pytest.approx(-6 + 5 * 0.2**2)  # 19/95 = 0.2
    assert [value("blocks.0.att.time_faaaa", i) for i in (0, 1, 2)] == pytest.approx([0, 0.1, -0.1])
    assert value("blocks.3.att.time_faaaa", 19) == pytest.approx(0.8 + 0.1)
    assert value("blocks.0.att.ln_x.weight", 0) == pytest.approx(0.25**0.7)
    assert value("blocks.1.ln2.weight", 5) == 1
    for name in (
        "att.output.weight",
        "ffn.value.weight",
        "ffn.receptance.weight",
        "att.time_maa_w1",
        "ln1.bias",
    ):
        assert not weights[f"blocks.1.{name}"].any(), name
    assert 0.5e-4 < weights["emb.weight"].abs().max() <= 1e-4
    assert 0.005 < weights["blocks.1.att.time_maa_w2"].abs().max() <= 0.01
    for name, gain in {
        "blocks.1.att.key.weight": 0.1,
        "blocks.1.att.gate.weight": 0.1,
        "blocks.1.att.value.weight": 1,
        "blocks.1.ffn.key.weight": 1,
        "head.weight": 0.5 * (300 / 96) ** 0.5,
    }.items():
        gram = weights[name].T @ weights[name]
        torch.testing.assert_close(gram, gain**2 * torch.eye(96), atol=1e-5, rtol=1e-5, msg=name)
