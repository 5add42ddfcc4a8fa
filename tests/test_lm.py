"""The entry to the language models: which generation a file holds, and what importing it costs."""

import subprocess
import sys

import pytest

from bench.random_model import write_model
from rwkv_speech.lm import load
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
