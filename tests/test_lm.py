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
