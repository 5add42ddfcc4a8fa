"""The language models against the `rwkv` package (an independent implementation), against fp64, and in other shapes."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rwkv_speech.lm import linear, load, wkv
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.rwkv6 import RWKV6
from rwkv_speech.lm.rwkv7 import RWKV7
from rwkv_speech.lm.state import LayerState, State

VOCABULARY = 300


def sizes_of(generation, **how):
    return official_sizes(**{"generation": generation, "n_layer": 4, "n_embd": 256, "vocab_size": VOCABULARY} | how)


# The second RWKV-7 has another ffn width, smaller heads, and what some files have in the first layer.
MODELS = {
    "rwkv6": sizes_of(6),
    "rwkv7": sizes_of(7),
    "rwkv7-N32": replace(sizes_of(7, head_size=32), dim_ffn=896),
}


@pytest.fixture(scope="module", params=MODELS)
def l4_path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / f"{request.param}.pth"
    torch.save(random_weights(MODELS[request.param], seed=3, time_state=True), path)
    if request.param == "rwkv7-N32":
        extra = {f"blocks.0.att.v{i}": torch.full((1, 1, 7), torch.nan) for i in range(3)}
        torch.save(torch.load(path, weights_only=True) | extra, path)
    return path


@pytest.fixture(scope="module")
def l4(l4_path):
    return load(l4_path)


@pytest.fixture(scope="module", params=[6, 7], ids=["rwkv6", "rwkv7"])
def small(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.pth"
    torch.save(random_weights(sizes_of(request.param, n_layer=2, n_embd=128), seed=5, time_state=True), path)
    return load(path)


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


PACKAGE = """
import sys, torch
from rwkv.model import RWKV
path, data = sys.argv[1:]
tokens, states = torch.load(data)
model = RWKV(model=path, strategy="cpu fp32")
torch.save([model.forward(tokens, state, full_output=True) for state in states], data)
"""


@pytest.fixture(scope="module")
def package(l4_path, l4):
    """What the rwkv package makes of the file, from three initial states: logits of all tokens, and the state after.

    It runs in a process of its own, as it takes the generation from the environment when it is imported.
    """
    tokens = torch.randint(1, VOCABULARY, (300,), generator=torch.Generator().manual_seed(1))
    tuned = l4.initial_state(1)
    zero = tuned.map(torch.zeros_like)
    g = torch.Generator().manual_seed(2)
    full = tuned.map(lambda x: torch.randn(x.shape, generator=g))
    states = {"zero": zero, "tuned": tuned, "full": full}
    key_first = l4.generation == 6  # theirs are [key, value] for RWKV-6, [value, key] for RWKV-7

    def theirs(layer):
        return [layer.att_shift[0], layer.wkv.mT.contiguous() if key_first else layer.wkv, layer.ffn_shift[0]]

    data = l4_path.with_suffix(".data")
    torch.save((tokens.tolist(), [[x for layer in s.layers for x in theirs(layer)] for s in states.values()]), data)
    environment = os.environ | {"RWKV_V7_ON": str(int(l4.generation == 7)), "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    command = [sys.executable, "-c", PACKAGE, str(l4_path.with_suffix("")), str(data)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    results = {}
    for name, (logits, after) in zip(states, torch.load(data), strict=True):
        layers = [LayerState(b.mT if key_first else b, a, c) for a, b, c in zip(*[iter(after)] * 3, strict=True)]
        results[name] = (tokens, states[name], logits, layers)
    return results


@pytest.mark.parametrize("start", ["zero", "tuned", "full"])
@pytest.mark.parametrize("spans", [[300], [1, 7, 92, 3, 64, 133], [1] * 300], ids=["one-pass", "odd-passes", "steps"])
def test_logits_and_states_equal_the_rwkv_packages(l4, package, spans, start):
    tokens, state, want, want_layers = package[start]
    assert sum(spans) == len(tokens)
    hidden = []
    for part in tokens.split(spans):
        h, state = l4(part[None], None if start == "tuned" and not hidden else state)
        hidden.append(h[0])
    assert relative_error(l4.logits(torch.cat(hidden)), want) <= 1e-4
    for layer, want_layer in zip(state.layers, want_layers, strict=True):
        for got, wanted in zip(layer, want_layer, strict=True):
            assert relative_error(got[0], wanted) <= 1e-4


def naive_rwkv7(tensors, sizes, x, states):
    """Logits of one sequence x (T, C) from the formulas, a loop over time in every layer, in fp64."""
    z = {name: tensor.double().squeeze() for name, tensor in tensors.items()}
    H, N, C = sizes.n_head, sizes.head_size, sizes.n_embd

    def norm(x, name, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], z[f"{name}.weight"], z[f"{name}.bias"], eps)

    x, first = norm(x, "blocks.0.ln0"), None
    for layer, S in enumerate(states):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        p, outs, v_all = norm(x, f"blocks.{layer}.ln1"), [], []
        for t in range(len(p)):
            change = (p[t - 1] if t else 0) - p[t]
            x_r, x_w, x_k, x_v, x_a, x_g = (p[t] + change * z[att + f"x_{n}"] for n in "rwkvag")
            r, k, v = (z[att + f"{n}.weight"] @ y for n, y in {"receptance": x_r, "key": x_k, "value": x_v}.items())
            decay = z[att + "w0"] + torch.tanh(x_w @ z[att + "w1"]) @ z[att + "w2"]
            d = torch.exp(-math.exp(-0.5) * torch.sigmoid(decay))
            if layer:
                v = v + (first[t] - v) * torch.sigmoid(z[att + "v0"] + x_v @ z[att + "v1"] @ z[att + "v2"])
            a = torch.sigmoid(z[att + "a0"] + x_a @ z[att + "a1"] @ z[att + "a2"])
            g = torch.sigmoid(x_g @ z[att + "g1"]) @ z[att + "g2"]
            kk = (k * z[att + "k_k"]).view(H, N)
            kk = kk / kk.norm(dim=-1, keepdim=True)
            r, d, k, v_h, a = (y.view(H, N) for y in (r, d, k * (1 + (a - 1) * z[att + "k_a"]), v, a))
            S = S * d[:, None] - (S @ kk[..., None]) @ (kk * a)[:, None] + v_h[..., None] @ k[:, None]
            y = (S @ r[..., None])[..., 0]
            y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 64e-5).sqrt()
            y = y.reshape(C) * z[att + "ln_x.weight"] + z[att + "ln_x.bias"]
            y = y + ((r * k * z[att + "r_k"]).sum(-1, keepdim=True) * v_h).reshape(C)
            outs.append(z[att + "output.weight"] @ (y * g))
            v_all.append(v)
        first = first or v_all
        x = x + torch.stack(outs)
        p = norm(x, f"blocks.{layer}.ln2")
        mixed = p + (torch.cat([0 * p[:1], p[:-1]]) - p) * z[ffn + "x_k"]
        x = x + torch.relu(mixed @ z[ffn + "key.weight"].T) ** 2 @ z[ffn + "value.weight"].T
    return norm(x, "ln_out") @ z["head.weight"].T


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gradients_of_rwkv7_equal_those_of_a_naive_fp64_model(tmp_path, checkpointing):
    sizes = sizes_of(7, n_layer=3, n_embd=128, head_size=32)
    torch.save(random_weights(sizes, seed=7, time_state=True), tmp_path / "model.pth")
    model = load(tmp_path / "model.pth")
    model.checkpointing = checkpointing
    lengths = [21, 6]
    x = torch.randn(2, 21, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    states = [state.requires_grad_() for state in model.time_states]
    hidden, _ = model(x, lengths=torch.tensor(lengths))
    losses = [model.logits(hidden[b, :n]).log_softmax(-1)[:, 5].sum() for b, n in enumerate(lengths)]
    got = torch.autograd.grad(sum(losses), (x, *states))

    tensors = {name: tensor for name, tensor in model.state_dict().items() if "time_state" not in name}
    x, *states = (y.detach().double().requires_grad_() for y in (x, *states))
    naive = [naive_rwkv7(tensors, sizes, x[b, :n], states).log_softmax(-1)[:, 5].sum() for b, n in enumerate(lengths)]
    want = torch.autograd.grad(sum(naive), (x, *states))
    for loss, exact in zip(losses, naive, strict=True):
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for g, exact in zip(got, want, strict=True):
        assert relative_error(g, exact) <= 1e-4
    assert not got[0][1, 6:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_stays_near_fp32(l4_path, l4, dtype):
    half = load(l4_path, dtype=dtype)
    assert half.dtype == dtype
    assert half.blocks[0].att.time_state.dtype == torch.float32
    tokens = torch.randint(1, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(2))
    got, want = (model.logits(model(tokens)[0]).float() for model in (half, l4))
    assert relative_error(got, want) <= (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("generation", [6, 7])
def test_fp16_keeps_24_layers_in_range(generation):
    """Weights scaled as trained ones are: a few channels of the residual stream, of the ffn and of RWKV-6's state, in
    which y and k^2 and what is added to the stream, leave the range of fp16, 65,504."""
    sizes = sizes_of(generation, n_layer=24, n_embd=128)
    tensors = random_weights(sizes, seed=4)
    for layer in range(24):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        for name in (f"{att}output.weight", f"{ffn}value.weight"):
            tensors[name] *= 0.1
            tensors[name][[5, 77]] *= 3e5
        tensors[f"{ffn}key.weight"][[3, 50]] *= 150
        tensors[f"{ffn}value.weight"][:, [3, 50]] /= 150**2
        if generation == 6:
            for name in ("receptance", "key", "value"):
                tensors[f"{att}{name}.weight"] *= 30
    tokens = torch.randint(1, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(2))
    exact, half, brain = (
        (RWKV6 if generation == 6 else RWKV7).from_tensors(sizes, dict(tensors), device="cpu", dtype=dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    )
    largest = {}

    def watch(name, module):
        def note(_, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            largest[name] = max(largest.get(name, 0.0), x.abs().max().item())

        module.register_forward_hook(note)

    for block in exact.blocks:
        for name, module in (("stream", block), ("added", block.ffn), ("k", block.ffn.key)):
            watch(name, module)
    want, got, rough = (model.logits(model(tokens)[0]).float() for model in (exact, half, brain))
    assert min(largest["stream"], largest["added"], largest["k"] ** 2) > 65504, largest
    # Rounding shows much in so deep a model of random weights: the measure is bf16, which has range but fewer digits.
    assert relative_error(got, want) <= relative_error(rough, want)


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


@pytest.mark.parametrize("learns", ["x", "weights", "both"])
def test_products_of_few_rows_have_the_gradients_of_torchs_own(learns):
    wkv.backend("cpu")
    g = torch.Generator().manual_seed(0)

    def new(*shape, what):
        return torch.randn(shape, generator=g).requires_grad_(learns in (what, "both"))

    x, weight = new(2, 1, 48, what="x"), new(37, 48, what="weights")
    heads, matrices = new(5, 2, 48, what="x"), new(5, 48, 37, what="weights")
    first, second = new(48, 6, what="weights"), new(6, 48, what="weights")
    with torch.no_grad():
        expected = F.linear(x, weight)
        assert linear.few(x, 48, weight), "the case is void: the kernel doesn't take it"
        torch.testing.assert_close(linear.linear(x, weight), expected)
    pairs = (
        (linear.linear(x, weight), F.linear(x, weight), (x, weight)),
        (linear.bmm(heads, matrices), heads @ matrices, (heads, matrices)),
        (linear.low_rank(x, first, second, torch.tanh), torch.tanh(x @ first) @ second, (x, first, second)),
    )
    for ours, theirs, tensors in pairs:
        tensors = [tensor for tensor in tensors if tensor.requires_grad]
        got, want = (torch.autograd.grad(y.square().sum(), tensors) for y in (ours, theirs))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
