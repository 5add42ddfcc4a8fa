"""Every backend of both WKV operators against the fp64 loops of the references: values and all gradients."""

import pytest
import torch
from wkv_cases import CASES, relative_error, values_and_gradients

from rwkv_speech.lm import wkv
from rwkv_speech.lm.wkv6 import wkv6_reference
from rwkv_speech.lm.wkv7 import wkv7_reference

SHAPES = {
    "B1-T1-H1-N64": (1, 1, 1, 64),
    "B3-T2-H2-N64": (3, 2, 2, 64),
    "B2-T17-H3-N64": (2, 17, 3, 64),
    "B2-T129-H2-N64": (2, 129, 2, 64),
    "B2-T1024-H1-N64": (2, 1024, 1, 64),
    "B2-T70-H2-N32": (2, 70, 2, 32),
    "B2-T70-H2-N128": (2, 70, 2, 128),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    wkv.set_backend(request.param)
    yield request.param
    wkv.set_backend("auto")


@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-state", "shared-state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_the_reference(backend, case, shape, dtype, shared, with_lengths):
    B, T, _, _ = shape
    inputs = case.inputs(*shape, dtype=dtype, shared=shared)
    lengths = torch.tensor([max(1, T - 5 * b - T // 3) for b in range(B)]) if with_lengths else None
    got = values_and_gradients(case.run, inputs, lengths)
    want = values_and_gradients(case.reference, inputs, lengths)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    errors = {name: relative_error(x, y) for name, x, y in zip(case.names, got, want, strict=True)}
    assert all(error <= bound for error in errors.values()), errors
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32


def test_wkv6_reference_by_hand():
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


def test_wkv7_reference_by_hand():
    # One head of two channels over two steps. d = exp(-exp(-1/2) sigmoid(w)) = 3/4 for w = logit(exp(1/2) ln(4/3)).
    w = torch.logit(torch.tensor(0.5).exp() * torch.tensor(4 / 3).log())
    r = torch.tensor([[1.0, 2.0], [1.0, 1.0]]).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).view(1, 2, 1, 2)
    v = torch.tensor([[5.0, 7.0], [1.0, 2.0]]).view(1, 2, 1, 2)
    a = torch.tensor([[-1.0, 0.0], [0.0, -1.0]]).view(1, 2, 1, 2)
    b = torch.tensor([[0.5, 1.0], [0.0, 0.25]]).view(1, 2, 1, 2)
    state = torch.tensor([[[4.0, 8.0], [12.0, 16.0]]])  # [value, key]
    y, final = wkv7_reference(r, w.expand(1, 2, 1, 2), k, v, a, b, state)
    # S <- 3/4 S + (S a) b^T + v k^T, then y = S r.
    # Step 1: S a = (-4, -12), S = [[3, 6], [9, 12]] + [[-2, -4], [-6, -12]] + [[5, 0], [7, 0]] = [[6, 2], [10, 0]].
    # Step 2: S a = (-2, 0), S = [[4.5, 1.5], [7.5, 0]] + [[0, -0.5], [0, 0]] + [[0, 3], [0, 6]] = [[4.5, 4], [7.5, 6]].
    torch.testing.assert_close(y[0, :, 0], torch.tensor([[10.0, 10.0], [8.5, 13.5]]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(final[0, 0], torch.tensor([[4.5, 4.0], [7.5, 6.0]]).double(), rtol=1e-6, atol=0)


def test_a_carried_state_continues_the_sequence(backend, case):
    *inputs, state = (x.detach() for x in case.inputs(2, 50, 2, 64))
    n = len(case.operator.steps)
    whole, final = case.run(*inputs, state)
    parts = []
    for span in (slice(0, 1), slice(1, 34), slice(34, 50)):
        y, state = case.run(*(x[:, span] for x in inputs[:n]), *inputs[n:], state)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), whole) <= 1e-5
    assert relative_error(state, final) <= 1e-5


@pytest.mark.parametrize("T", [1, 2, 17, 129])
def test_strongest_and_weakest_decays(backend, case, T):
    for value in (case.weakest, case.strongest):
        inputs = case.inputs(1, T, 1, 64)
        inputs[case.operator.inputs.index("w")] = torch.full((1, T, 1, 64), value)
        got, want = (values_and_gradients(f, inputs, None) for f in (case.run, case.reference))
        for name, x, y in zip(case.names, got, want, strict=True):
            assert (x.double() - y.double()).norm() <= 1e-5 * max(1.0, y.norm().item()), (name, value)


@pytest.mark.parametrize("w", [-3.0, 0.0, 1.0, 2.0, 3.0, 4.0])
def test_gradient_of_the_decay_holds_at_every_strength(w):
    # Where d = exp(-exp(w)) is small (2e-24 at w = 4) its gradient is a small number among large ones. It is compared
    # channel by channel, so that no channel hides behind another, one of them with a decay much weaker than the rest.
    wkv.set_backend("cpu")
    inputs = [x.detach() for x in CASES["wkv6"].inputs(2, 70, 1, 64)]
    inputs[3] = torch.full_like(inputs[3], w)
    inputs[3][..., 5] = -4.0
    got, want = (values_and_gradients(f, inputs, None)[5].double() for f in (wkv.wkv6, wkv6_reference))
    wkv.set_backend("auto")
    errors = (got - want).flatten(0, 2).norm(dim=0) / want.flatten(0, 2).norm(dim=0)
    assert errors.max() <= 1e-5, errors


@pytest.mark.parametrize("w", [float("-inf"), 30.0, 100.0], ids=["never-forgets", "d-is-0", "exp-w-overflows"])
def test_decays_beyond_fp32_give_finite_gradients(w):
    wkv.set_backend("cpu")
    inputs = [x.detach() for x in CASES["wkv6"].inputs(1, 40, 1, 32)]
    inputs[3] = torch.full_like(inputs[3], w)
    got = values_and_gradients(wkv.wkv6, inputs, None)
    wkv.set_backend("auto")
    assert all(x.isfinite().all() for x in got)
    assert not got[5].any()  # a decay of exactly 1 or 0 does not move


@pytest.mark.parametrize("w", [-torch.inf, -100.0, 100.0, torch.inf])
def test_wkv7_where_the_sigmoid_saturates(backend, w):
    case = CASES["wkv7"]
    inputs = [x.detach() for x in case.inputs(1, 40, 1, 32)]
    inputs[1] = torch.full_like(inputs[1], w)
    got, want = (values_and_gradients(f, inputs, None) for f in (case.run, case.reference))
    for name, x, y in zip(case.names, got, want, strict=True):
        assert relative_error(x, y) <= 1e-5 if name != "gw" else x.abs().max() <= 1e-30, name


@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
def test_opcheck(backend, case, with_lengths):
    inputs = case.inputs(2, 40, 2, 32, shared=True)
    lengths = torch.tensor([40, 7]) if with_lengths else None
    operator = getattr(torch.ops.rwkv_speech, case.operator.name)
    torch.library.opcheck(operator.default, (*inputs, lengths, True))


def test_compiled_equals_eager(backend, case):
    inputs = case.inputs(2, 33, 2, 32, shared=True)

    def scaled(*args):
        y, final_state = case.run(*args[:-1], args[-1])
        return y * 2, final_state

    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    got, want = (values_and_gradients(f, inputs, torch.tensor([33, 5])) for f in (compiled, scaled))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_memory_of_backward_grows_slowly_with_time(case):
    # What forward leaves behind beside its inputs: one state every 32 steps, 1/32 of what autograd of a loop keeps.
    operator = getattr(torch.ops.rwkv_speech, case.operator.name)
    saved = operator(*case.inputs(1, 320, 1, 64), None, True)[2]
    assert saved.numel() == 10 * 64 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.__setitem__(1, x[1][:, :3]), r"one shape \(B, T, H, N\)"),
        (lambda x: x.__setitem__(2, x[2].bfloat16()), "share one dtype"),
        (lambda x: x.__setitem__(-1, x[-1][:1]), "state must be"),
        (lambda x: [x.__setitem__(i, x[i][..., :16]) for i in range(len(x))], "head size must be one of"),
    ],
    ids=["shapes", "dtypes", "state", "head-size"],
)
def test_misfitting_inputs_are_named(case, change, message):
    inputs = [x.detach() for x in case.inputs(2, 4, 2, 32)]
    change(inputs)
    with pytest.raises(ValueError, match=f"{case.operator.name}: .*{message}"):
        case.run(*inputs)


def test_a_misfitting_bonus_is_named():
    inputs = [x.detach() for x in CASES["wkv6"].inputs(2, 4, 2, 32)]
    inputs[4] = inputs[4][:, :16]
    with pytest.raises(ValueError, match=r"wkv6: u must be \(H, N\) = \(2, 32\), not \(2, 16\)"):
        wkv.wkv6(*inputs)


def test_threads_change_nothing(case):
    wkv.set_backend("cpu")
    inputs, before = case.inputs(3, 70, 5, 64), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(values_and_gradients(case.run, inputs, torch.tensor([70, 1, 33])))
    torch.set_num_threads(before)
    wkv.set_backend("auto")
    for result in results:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
