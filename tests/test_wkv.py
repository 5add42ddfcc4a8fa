"""Every backend of the WKV operator against the fp64 loops of the reference: values and all six gradients."""

import pytest
import torch
from torch import Tensor

from rwkv_speech.lm import wkv
from rwkv_speech.lm.wkv6 import wkv6_reference

NAMES = ("y", "final_state", "gr", "gk", "gv", "gw", "gu", "g_state")


def make_inputs(B, T, H, N, *, dtype=torch.float32, shared=False, seed=0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    r, k, v = (normal(B, T, H, N).to(dtype) for _ in range(3))
    # Decays from "forgets at once" (w = 3) to "remembers for good" (w = -7), as trained models have them.
    w = (torch.rand(B, T, H, N, generator=g) * 10 - 7).to(dtype)
    state = normal(H, N, N) if shared else normal(B, H, N, N)
    return [x.requires_grad_() for x in (r, k, v, w, normal(H, N), state)]


def values_and_gradients(operator, inputs, lengths, *, seed=1) -> dict[str, Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y, final_state = operator(*inputs, lengths)
    g = torch.Generator().manual_seed(seed)
    gy, g_final = (torch.randn(x.shape, generator=g) for x in (y, final_state))
    loss = (y.double() * gy.to(y.device)).sum() + (final_state.double() * g_final.to(y.device)).sum()
    grads = torch.autograd.grad(loss, inputs)
    return dict(zip(NAMES, (y, final_state, *grads), strict=True))


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double().cpu() - want.double()).norm() / want.double().norm()).item()


SHAPES = {
    "B1-T1-H1-N64": (1, 1, 1, 64),
    "B3-T2-H2-N64": (3, 2, 2, 64),
    "B2-T17-H3-N64": (2, 17, 3, 64),
    "B2-T129-H2-N64": (2, 129, 2, 64),
    "B2-T1024-H1-N64": (2, 1024, 1, 64),
    "B2-T70-H2-N32": (2, 70, 2, 32),
    "B2-T70-H2-N128": (2, 70, 2, 128),
}


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    wkv.set_backend(request.param)
    yield request.param
    wkv.set_backend("auto")


@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-state", "shared-state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_the_reference(backend, shape, dtype, shared, with_lengths):
    B, T, _, _ = shape
    inputs = make_inputs(*shape, dtype=dtype, shared=shared)
    lengths = torch.tensor([max(1, T - 5 * b - T // 3) for b in range(B)]) if with_lengths else None
    got = values_and_gradients(wkv.wkv6, inputs, lengths)
    want = values_and_gradients(wkv6_reference, inputs, lengths)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    errors = {name: relative_error(got[name], want[name]) for name in NAMES}
    assert all(error <= bound for error in errors.values()), errors
    assert got["y"].dtype == dtype
    assert got["final_state"].dtype == torch.float32


def test_reference_by_hand():
    # One head of two channels over two steps, worked out on paper. d = exp(-exp(w)) = 1/2 for w = ln ln 2.
    half = torch.tensor(2.0).log().log()
    r = torch.tensor([[1.0, 2.0], [1.0, 1.0]]).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).view(1, 2, 1, 2)
    v = torch.tensor([[5.0, 7.0], [1.0, 2.0]]).view(1, 2, 1, 2)
    u = torch.tensor([[10.0, 100.0]])
    state = torch.tensor([[[2.0, 4.0], [6.0, 8.0]]])  # [value, key]
    y, final = wkv6_reference(r, k, v, half.expand(1, 2, 1, 2), u, state)
    # Step 1: S r + (r.u k) v = (2+8, 6+16) + 10 (5, 7).  Then S = S/2 + v k^T = [[6, 2], [10, 4]].
    # Step 2: S r + (r.u k) v = (8, 14) + 300 (1, 2).     Then S = S/2 + v k^T = [[3, 4], [5, 8]].
    torch.testing.assert_close(y[0, :, 0], torch.tensor([[60.0, 92.0], [308.0, 614.0]]).double())
    torch.testing.assert_close(final[0, 0], torch.tensor([[3.0, 4.0], [5.0, 8.0]]).double())


def test_a_carried_state_continues_the_sequence(backend):
    inputs = make_inputs(2, 50, 2, 64)
    r, k, v, w, u, state = (x.detach() for x in inputs)
    whole, final = wkv.wkv6(r, k, v, w, u, state)
    parts = []
    for span in (slice(0, 1), slice(1, 34), slice(34, 50)):
        y, state = wkv.wkv6(r[:, span], k[:, span], v[:, span], w[:, span], u, state)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), whole) <= 1e-5
    assert relative_error(state, final) <= 1e-5


def test_strong_and_weak_decays_stay_finite(backend):
    r, k, v, w, u, state = (x.detach() for x in make_inputs(1, 64, 1, 64))
    for value in (-30.0, 6.0):  # a decay of 1 in fp32, and one of 0
        inputs = [r, k, v, torch.full_like(w, value), u, state]
        got = values_and_gradients(wkv.wkv6, inputs, None)
        want = values_and_gradients(wkv6_reference, inputs, None)
        for name in NAMES:
            error = (got[name].double() - want[name].double()).abs().max()
            assert error <= 1e-4 * max(1.0, want[name].abs().max()), name


@pytest.mark.parametrize("w", [-3.0, 0.0, 1.0, 2.0, 3.0, 4.0])
def test_gradient_of_the_decay_holds_at_every_strength(w):
    # Where d = exp(-exp(w)) is small (2e-24 at w = 4) its gradient is a small number among large ones. It is compared
    # channel by channel, so that no channel hides behind another, one of them with a decay much weaker than the rest.
    wkv.set_backend("cpu")
    inputs = [x.detach() for x in make_inputs(2, 70, 1, 64)]
    inputs[3] = torch.full_like(inputs[3], w)
    inputs[3][..., 5] = -4.0
    got, want = (values_and_gradients(f, inputs, None)["gw"].double() for f in (wkv.wkv6, wkv6_reference))
    wkv.set_backend("auto")
    errors = (got - want).flatten(0, 2).norm(dim=0) / want.flatten(0, 2).norm(dim=0)
    assert errors.max() <= 1e-5, errors


@pytest.mark.parametrize("w", [float("-inf"), 30.0, 100.0], ids=["never-forgets", "d-is-0", "exp-w-overflows"])
def test_decays_beyond_fp32_give_finite_gradients(w):
    wkv.set_backend("cpu")
    inputs = [x.detach() for x in make_inputs(1, 40, 1, 32)]
    inputs[3] = torch.full_like(inputs[3], w)
    got = values_and_gradients(wkv.wkv6, inputs, None)
    wkv.set_backend("auto")
    assert all(x.isfinite().all() for x in got.values())
    assert not got["gw"].any()  # a decay of exactly 1 or 0 does not move


@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
def test_opcheck(backend, with_lengths):
    inputs = make_inputs(2, 40, 2, 32, shared=True)
    lengths = torch.tensor([40, 7]) if with_lengths else None
    torch.library.opcheck(torch.ops.rwkv_speech.wkv6.default, (*inputs, lengths, True))


def test_compiled_equals_eager(backend):
    inputs = make_inputs(2, 33, 2, 32, shared=True)

    def scaled(*args):
        y, final_state = wkv.wkv6(*args[:-1], args[-1])
        return y * 2, final_state

    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    got, want = (values_and_gradients(f, inputs, torch.tensor([33, 5])) for f in (compiled, scaled))
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)


def test_memory_of_backward_grows_slowly_with_time():
    # What forward leaves behind beside its inputs: one state every 32 steps, 1/32 of what autograd of a loop keeps.
    saved = torch.ops.rwkv_speech.wkv6(*make_inputs(1, 320, 1, 64), None, True)[2]
    assert saved.numel() == 10 * 64 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.__setitem__(1, x[1][:, :3]), r"one shape \(B, T, H, N\)"),
        (lambda x: x.__setitem__(2, x[2].bfloat16()), "share one dtype"),
        (lambda x: x.__setitem__(4, x[4][:, :16]), r"u must be \(H, N\) = \(2, 32\), not \(2, 16\)"),
        (lambda x: x.__setitem__(5, x[5][:1]), "state must be"),
        (lambda x: [x.__setitem__(i, x[i][..., :16]) for i in range(4)], "head size must be one of"),
    ],
    ids=["shapes", "dtypes", "u", "state", "head-size"],
)
def test_misfitting_inputs_are_named(change, message):
    inputs = [x.detach() for x in make_inputs(2, 4, 2, 32)]
    change(inputs)
    with pytest.raises(ValueError, match=message):
        wkv.wkv6(*inputs)


def test_threads_change_nothing():
    wkv.set_backend("cpu")
    inputs, before = make_inputs(3, 70, 5, 64), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(values_and_gradients(wkv.wkv6, inputs, torch.tensor([70, 1, 33])))
    torch.set_num_threads(before)
    wkv.set_backend("auto")
    for name in NAMES:
        assert all(torch.equal(result[name], results[0][name]) for result in results), name
