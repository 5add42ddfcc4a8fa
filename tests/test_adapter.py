"""The adapter against a hand-worked example and a loop that spells the stacking out."""

import pytest
import torch

from rwkv_speech.speech.adapter import Adapter


def test_hand_worked_k2_stacks_channel_major():
    """K = 2, width 2, five frames: input = channel * K + offset.

    Frames (1, 10), (2, 20) make (1, 2, 10, 20); (3, 30), (4, 40) make (3, 4, 30, 40); the fifth is dropped.
    Hidden unit 0 = 1*x0 + 2*x1 + 3*x2 + 4*x3 + 0.5: 1 + 4 + 30 + 80 + 0.5 = 115.5, then 3 + 8 + 90 + 160 + 0.5 = 261.5.
    Hidden unit 1 = -x0 - 1 = -2, then -4: ReLU makes both 0.
    Output = 2 * unit 0 + 7 * unit 1 - 1 = 230, then 522. (Frame-major stacking would give 1 + 20 + 6 + 80 + 0.5.)
    """
    adapter = Adapter(2, 1, downsample_k=2, hidden=2)
    adapter.layers.load_state_dict(
        {
            "0.weight": torch.tensor([[1.0, 2, 3, 4], [-1, 0, 0, 0]]),
            "0.bias": torch.tensor([0.5, -1]),
            "2.weight": torch.tensor([[2.0, 7]]),
            "2.bias": torch.tensor([-1.0]),
        }
    )
    frames = torch.tensor([[[1.0, 10], [2, 20], [3, 30], [4, 40], [5, 50]]])
    positions, lengths = adapter(frames, torch.tensor([5]))
    assert positions.flatten().tolist() == [230.0, 522.0]
    assert lengths.tolist() == [2]


@pytest.mark.parametrize("K", [1, 3, 5])
def test_matches_a_naive_loop(K):
    torch.manual_seed(0)
    width, n_embd = 6, 8
    adapter = Adapter(width, n_embd, downsample_k=K, hidden=16).double()
    counts = [0, 1, K - 1, K, 2 * K + 1, 17]
    frames = torch.randn(len(counts), max(counts), width, dtype=torch.float64)  # padding is noise on purpose
    positions, lengths = adapter(frames, torch.tensor(counts))

    weights = adapter.layers.state_dict()
    for b, count in enumerate(counts):
        rows = [frames[b, t].tolist() for t in range(count)]
        while len(rows) < K:
            rows.append([0.0] * width)
        assert lengths[b] == adapter.group_count(count) == len(rows) // K
        for g in range(len(rows) // K):
            x = torch.tensor([rows[g * K + offset][c] for c in range(width) for offset in range(K)]).double()
            hidden = (weights["0.weight"] @ x + weights["0.bias"]).clamp(min=0)
            expected = weights["2.weight"] @ hidden + weights["2.bias"]
            torch.testing.assert_close(positions[b, g], expected)


def test_batch_shorter_than_one_group():
    adapter = Adapter(3, 4, hidden=8)
    frames = torch.randn(2, 2, 3)
    positions, lengths = adapter(frames, torch.tensor([2, 1]))
    assert positions.shape == (2, 1, 4)
    assert lengths.tolist() == [1, 1]
    padded = torch.cat([frames[:1], torch.zeros(1, 3, 3)], dim=1)
    torch.testing.assert_close(positions[:1], adapter(padded, torch.tensor([5]))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fp32_master_weights_under_half_precision(dtype):
    torch.manual_seed(0)
    adapter = Adapter(8, 4, downsample_k=2, hidden=32)
    frames, lengths = torch.randn(2, 9, 8), torch.tensor([9, 6])
    exact, _ = adapter(frames, lengths)
    half, _ = adapter(frames.to(dtype), lengths)
    assert half.dtype is dtype
    torch.testing.assert_close(half.float(), exact, atol=0.03, rtol=0.03)
    half.float().square().sum().backward()
    for name, weight in adapter.named_parameters():
        assert weight.dtype is weight.grad.dtype is torch.float32, name
        assert weight.grad.abs().max() > 0, name


def test_published_names_and_default_sizes():
    shapes = {name: tuple(x.shape) for name, x in Adapter(1024, 2560).layers.state_dict().items()}
    assert shapes == {
        "0.weight": (2048, 5120),
        "0.bias": (2048,),
        "2.weight": (2560, 2048),
        "2.bias": (2560,),
    }


@pytest.mark.parametrize("length", [1, 2, 9], ids=["shorter-than-a-group", "a-group", "groups"])
def test_standardised_frames_are_those_of_the_published_weights(length):
    torch.manual_seed(0)
    adapter, plain = (Adapter(3, 4, downsample_k=2, hidden=8).double() for _ in range(2))
    frames = 5 * torch.randn(1, length, 3, dtype=torch.double) + 7
    mean, std = torch.tensor([70.0, -1.0, 0.5]), torch.tensor([5.0, 0.5, 2.0])
    before, _ = adapter(frames, torch.tensor([length]))
    adapter.standardise(mean, std)
    got, _ = adapter(frames, torch.tensor([length]))
    assert not torch.allclose(got, before)
    plain.layers.load_state_dict(adapter.published())
    torch.testing.assert_close(plain(frames, torch.tensor([length]))[0], got)
    if length > 1:  # by the layers, on frames standardised outside
        adapter.layers[0].mean = None
        torch.testing.assert_close(adapter((frames - mean) / std, torch.tensor([length]))[0], got)


def test_in_half_precision_too_the_published_weights_do_the_same():
    torch.manual_seed(0)
    adapter, plain = (Adapter(3, 4, downsample_k=2, hidden=8) for _ in range(2))
    mean, std = torch.tensor([100.0, -20.0, 7.0]), torch.tensor([2.0, 0.5, 0.1])
    adapter.standardise(mean, std)
    plain.layers.load_state_dict(adapter.published())
    frames = (mean + std * torch.randn(2, 8, 3)).bfloat16()
    lengths = torch.tensor([8, 5])
    assert torch.equal(plain(frames, lengths)[0], adapter(frames, lengths)[0])


def test_standardised_weights_learn_as_on_standardised_frames():
    """The gradients of the weights themselves, which are of the size that optimisers expect."""
    torch.manual_seed(0)
    adapter, plain = (Adapter(3, 4, downsample_k=2, hidden=8).double() for _ in range(2))
    plain.load_state_dict(adapter.state_dict())
    mean, std = torch.tensor([70.0, -1.0, 0.5]), torch.tensor([5.0, 0.5, 2.0])
    adapter.standardise(mean, std)
    frames, lengths = mean + std * torch.randn(2, 8, 3, dtype=torch.double), torch.tensor([8, 8])
    adapter(frames, lengths)[0].square().sum().backward()
    plain((frames - mean) / std, lengths)[0].square().sum().backward()
    for (name, x), (_, y) in zip(adapter.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, msg=name)
