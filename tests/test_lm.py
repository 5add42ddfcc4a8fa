"""The entry to the language models: which generation a file holds, what importing it costs, the built operators."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.random_model import write_model
from rwkv_speech.lm import extension, load
from rwkv_speech.lm.initialise import official_sizes


@pytest.mark.parametrize("generation", [6, 7])
def test_the_generation_is_told_by_the_tensors(tmp_path, generation):
    import torch

    sizes = official_sizes(generation=generation, n_layer=2, n_embd=64, vocab_size=257, head_size=32)
    write_model(tmp_path / "model.pth", sizes, dtype=torch.float32, seed=0)
    model = load(tmp_path / "model.pth", dtype=torch.bfloat16)
    assert type(model).__name__ == f"RWKV{generation}"
    assert model.generation == generation
    assert model.sizes == sizes
    assert model.dtype == torch.bfloat16
    assert [state.shape for state in model.time_states] == [(2, 32, 32)] * 2
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_importing_is_light():
    code = "import sys, rwkv_speech.lm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("generation", [6, 7])
def test_a_step_in_one_call_is_the_step_of_the_formulas(monkeypatch, generation, dtype, batch):
    """Hidden vectors and every state, token by token; in bf16 nearer to fp32 than what rounds after each operation."""
    import torch

    from rwkv_speech.lm import step, wkv
    from rwkv_speech.lm.initialise import random_weights
    from rwkv_speech.lm.rwkv6 import RWKV6
    from rwkv_speech.lm.rwkv7 import RWKV7

    if wkv.backend("cpu").name != "cpu":
        pytest.skip("no C++ compiler")
    sizes = official_sizes(generation=generation, n_layer=3, n_embd=192, vocab_size=257)
    weights = random_weights(sizes, seed=1, dtype=getattr(torch, dtype), time_state=True)
    tokens = torch.randint(1, 257, (batch, 9), generator=torch.Generator().manual_seed(2))

    def run(compute: str) -> list[torch.Tensor]:
        model = {6: RWKV6, 7: RWKV7}[generation].from_tensors(
            sizes, dict(weights), device="cpu", dtype=getattr(torch, compute)
        )
        hidden, state = [], None
        for token in tokens.T:
            out, state = model(token[:, None], state)
            hidden.append(out)
        return [torch.cat(hidden, 1).float(), *(x.float() for layer in state.layers for x in layer)]

    with torch.inference_mode():
        at_once, taken = run(dtype), []
        monkeypatch.setattr(step, "takes", lambda *_: taken.append(True))
        formulas, exact = run(dtype), run("float32")
    assert taken, "the other way was gone"
    for got, want, true in zip(at_once, formulas, exact, strict=True):
        if dtype == "float32":
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        else:
            assert (got - true).norm() <= 1.1 * (want - true).norm()
            assert (got - true).norm() < 0.05 * true.norm()


# --- the extension cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Looks for the library in a cache of its own, as a new process does; the compiler and torch only note it.

    Gives the contents of the libraries that are built and loaded.
    """
    import torch
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    done = []

    def compile(name, sources, *, build_directory, **_):
        built = Path(build_directory) / f"{name}.so"
        assert not built.exists(), "ninja would take it for finished"
        built.write_bytes(b"a library")
        done.append("built")

    def build():
        done.clear()
        extension.load_cpu.__wrapped__()
        return done

    monkeypatch.setattr(cpp_extension, "load", compile)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: done.append(Path(path).read_bytes()))
    return build


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda library: library.write_bytes(b""), id="empty"),
        pytest.param(lambda library: library.write_bytes(b"a lib"), id="truncated"),
        pytest.param(lambda library: library.write_bytes(b"b library"), id="corrupt"),
        pytest.param(lambda library: library.unlink(), id="absent"),
        pytest.param(lambda library: library.with_name("done").write_bytes(b"\xff"), id="no-checksum"),
        pytest.param(lambda library: shutil.rmtree(library.parent), id="nothing"),
    ],
)
def test_a_damaged_library_is_built_again(tmp_path, build, damage):
    assert build() == ["built"]
    assert build() == [b"a library"]
    (library,) = tmp_path.glob("ext/*/*.so")
    damage(library)
    assert build() == ["built"]
    assert build() == [b"a library"]


def test_a_cache_that_cannot_be_written_to_is_one_line_unless_it_is_full(tmp_path, build):
    (tmp_path / "ext").write_text("in the way")  # root may write to any folder
    with pytest.raises(extension.BuildError, match=r"ext/.*Not a directory; .* by TORCH_EXTENSIONS_DIR"):
        build()
    (tmp_path / "ext").unlink()
    build()
    (folder,) = (tmp_path / "ext").iterdir()
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert build() == [b"a library"]


def test_half_a_library_does_not_end_the_process(tmp_path):
    """The system's loader takes such a file to its memory, and dies of SIGBUS where the rest of it is missing."""
    code = "from rwkv_speech.lm import extension; extension.load_cpu()"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/no/compiler"}
    extension.load_cpu()
    import torch

    (loaded,) = [Path(path) for path in torch.ops.loaded_libraries if "rwkv_speech_cpu" in path]
    folder = Path(shutil.copytree(loaded.parent, tmp_path / loaded.parent.name))
    os.truncate(folder / loaded.name, (folder / loaded.name).stat().st_size // 2)
    cut = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert cut.returncode == 1
    assert "BuildError: there is no C++ compiler (/no/compiler)" in cut.stderr
