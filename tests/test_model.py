"""The language model against the `rwkv` package (an independent implementation), and against itself in other shapes."""

import os

import pytest
import torch

from rwkv_speech.lm import wkv
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.rwkv6 import RWKV6
from rwkv_speech.lm.state import State


@pytest.fixture(scope="module")
def l4_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "l4.pth"
    torch.save(random_weights(official_sizes(n_layer=4, n_embd=256), seed=3, time_state=True), path)
    return path


@pytest.fixture(scope="module")
def l4(l4_path):
    return RWKV6.from_file(l4_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.pth"
    sizes = official_sizes(n_layer=2, n_embd=128, vocab_size=257)
    torch.save(random_weights(sizes, seed=5, time_state=True), path)
    return RWKV6.from_file(path)


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def package(l4_path):
    """The rwkv package's own reading of the file: logits of all tokens, and the state after them."""
    with pytest.MonkeyPatch.context() as env:
        for name, value in (("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0"), ("RWKV_V7_ON", "0")):
            env.setitem(os.environ, name, value)
        from rwkv.model import RWKV

        model = RWKV(model=str(l4_path.with_suffix("")), strategy="cpu fp32", verbose=False)
    tokens = torch.randint(1, 65530, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    logits, state = [], None
    for token in tokens:
        out, state = model.forward([token], state)
        logits.append(out)
    return torch.tensor(tokens), torch.stack(logits), state


@pytest.mark.parametrize("spans", [[300], [1, 7, 92, 3, 64, 133], [1] * 300], ids=["one-pass", "odd-passes", "steps"])
def test_logits_and_states_equal_the_rwkv_packages(l4, package, spans):
    tokens, want, want_state = package
    assert sum(spans) == len(tokens)
    state, hidden = None, []
    for part in tokens.split(spans):
        h, state = l4(part[None], state)
        hidden.append(h[0])
    assert relative_error(l4.logits(torch.cat(hidden)), want) <= 1e-4
    for i, layer in enumerate(state.layers):
        assert relative_error(layer.att_shift[0], want_state[3 * i]) <= 1e-4
        assert relative_error(layer.wkv[0].mT, want_state[3 * i + 1]) <= 1e-4  # theirs is [key, value]
        assert relative_error(layer.ffn_shift[0], want_state[3 * i + 2]) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_stays_near_fp32(l4_path, l4, dtype):
    half = RWKV6.from_file(l4_path, dtype=dtype)
    assert half.dtype == dtype
    assert half.blocks[0].att.time_state.dtype == torch.float32
    tokens = torch.randint(1, 65530, (1, 40), generator=torch.Generator().manual_seed(2))
    got, want = (model.logits(model(tokens)[0]).float() for model in (half, l4))
    assert relative_error(got, want) <= (0.05 if dtype == torch.bfloat16 else 0.01)


def test_a_padded_batch_gives_each_sample_what_it_gets_alone(small):
    lengths = torch.tensor([1, 30, 12, 2])
    inputs = torch.randn(4, 30, 128, generator=torch.Generator().manual_seed(0))
    hidden, state = small(inputs, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        alone, alone_state = small(inputs[b : b + 1, :length])
        torch.testing.assert_close(hidden[b : b + 1, :length], alone, rtol=1e-4, atol=1e-4)
        for got, want in zip(state.layers, alone_state.layers, strict=True):
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x[b : b + 1], y, rtol=1e-4, atol=1e-4)


def test_states_are_gathered_copied_and_saved(small, tmp_path):
    _, state = small(torch.randint(1, 257, (3, 9)))
    beams = state.select(torch.tensor([2, 0, 0, 1]))
    assert beams.batch_size == 4
    torch.testing.assert_close(beams.layers[1].wkv[2], state.layers[1].wkv[0], rtol=0, atol=0)
    torch.save(state.state_dict(), tmp_path / "state.pth")
    again = State.from_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    token = torch.tensor([[5], [6], [7]])
    torch.testing.assert_close(small(token, again)[0], small(token, state)[0], rtol=0, atol=0)
    copy = state.clone()
    copy.layers[0].wkv.zero_()
    assert state.layers[0].wkv.abs().sum() > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_a_state_holds_no_more_than_itself(small, batch):
    """Not, by a view, the activations of all positions that led to it."""
    _, state = small(torch.randint(1, 257, (batch, 50)))
    for layer in state.layers:
        for x in (layer.att_shift, layer.ffn_shift):
            assert x.untyped_storage().nbytes() == x.nbytes


def test_only_what_is_asked_for_gets_a_gradient(small):
    states = [block.att.time_state.requires_grad_() for block in small.blocks]
    inputs = torch.randn(2, 11, 128, requires_grad=True)
    hidden, _ = small(inputs)
    small.logits(hidden[:, -1]).logsumexp(-1).sum().backward()
    assert all(state.grad.abs().sum() > 0 for state in states)
    assert inputs.grad.abs().sum() > 0
    assert [name for name, p in small.named_parameters() if p.grad is not None and "time_state" not in name] == []
    for state in states:
        state.grad = None
        state.requires_grad_(False)


def test_gradient_of_the_initial_state_is_that_of_finite_differences(small):
    small.requires_grad_(False)
    state = small.blocks[0].att.time_state
    tokens = torch.randint(1, 257, (3, 7), generator=torch.Generator().manual_seed(4))

    def loss():
        hidden, _ = small(tokens, lengths=torch.tensor([7, 3, 5]))
        return torch.log_softmax(small.logits(hidden[:, 2]).double(), -1)[:, 5].sum()

    state.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(), state)
    state.requires_grad_(False)
    direction = torch.randn(state.shape, generator=torch.Generator().manual_seed(6))
    direction /= direction.norm()
    start, step = state.clone(), 0.1  # less is lost in the rounding of the fp32 model
    values = []
    for sign in (1, -1):
        state.copy_(start + sign * step * direction)
        values.append(loss().item())
    state.copy_(start)
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-2, abs=1e-5)


def test_checkpointing_changes_memory_and_nothing_else(small):
    inputs = torch.randn(2, 20, 128, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([20, 6])
    results = []
    for checkpointing in (False, True):
        small.checkpointing = checkpointing
        state = small.blocks[1].att.time_state.requires_grad_()
        x = inputs.clone().requires_grad_()
        loss = small.logits(small(x, lengths=lengths)[0][:, :6]).square().mean()
        results.append((loss, *torch.autograd.grad(loss, (x, state))))
        state.requires_grad_(False)
    small.checkpointing = False
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-7)


def test_compiled_model_gives_the_same_numbers(small):
    tokens = torch.randint(1, 257, (2, 6), generator=torch.Generator().manual_seed(0))
    state = small.blocks[0].att.time_state.requires_grad_()

    def run(model):
        loss = small.logits(model(tokens)[0]).square().mean()
        return loss, *torch.autograd.grad(loss, state)

    for compiled, eager in zip(run(torch.compile(small, backend="aot_eager")), run(small), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    state.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16])
def test_few_rows_linear_equals_fp64(rows, dtype):
    wkv.backend("cpu")
    g = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 203, generator=g).to(dtype) for n in (rows, 37))
    got = torch.ops.rwkv_speech_cpu.few_rows_linear(x, weight)
    want = x.double() @ weight.double().T
    assert got.dtype == dtype
    assert relative_error(got.double(), want) <= (1e-6 if dtype == torch.float32 else 3e-3)
    alone = torch.cat([torch.ops.rwkv_speech_cpu.few_rows_linear(row[None], weight) for row in x])
    assert torch.equal(got, alone), "a batch must give to the last bit what one row gives alone"


def test_reading_a_file_keeps_its_weights(l4_path, l4):
    tensors = torch.load(l4_path, weights_only=True)
    for name, parameter in l4.state_dict().items():
        assert torch.equal(parameter, tensors[name]), name
    assert not any(p.requires_grad for p in l4.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_few_rows_matmul_equals_fp64(rows, dtype):
    wkv.backend("cpu")
    g = torch.Generator().manual_seed(rows)
    x, matrix = torch.randn(5, rows, 37, generator=g).to(dtype), torch.randn(5, 37, 150, generator=g).to(dtype)
    got = torch.ops.rwkv_speech_cpu.few_rows_matmul(x, matrix)
    assert got.dtype == dtype
    assert relative_error(got.double(), x.double() @ matrix.double()) <= (1e-6 if dtype == torch.float32 else 3e-3)
