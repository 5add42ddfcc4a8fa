"""The benchmarks that reckon: how costs grow, and what 960 hours would take; against numbers worked out by hand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import growth, growth_costs, scale, timing
from bench.train import product_flops
from rwkv_speech.lm.initialise import official_sizes

README = Path(__file__).parents[1] / "README.md"


def test_exponent_is_the_slope_of_the_upper_half():
    assert growth.exponent([1, 2, 4, 8, 16], [7, 7, *(3 * n**1.5 for n in (4, 8, 16))]) == pytest.approx(1.5)


KNOWN = """
import torch
from bench import growth
from bench.growth_costs import Cost

def zeros(mib):
    return torch.zeros(mib << 20, dtype=torch.uint8)

class Known:
    def __init__(self, folder):
        pass

    def costs(self):
        yield Cost("blocks", "MiB", (4, 8, 16, 32), lambda n: lambda: [len(zeros(n)) for _ in range(3)], (9, 1), "")
        yield Cost("squares", "MiB", (2, 4, 8, 16), lambda n: lambda: zeros(n * n).max(), (9, 1), "as a test")

growth.Parts, growth.ENOUGH = Known, 0
growth.main()
"""


def test_growth_measures_memory_and_names_what_grows_too_fast(tmp_path):
    """Of what is there at once, 4 to 32 MiB and the square of 2 to 16; blocks that are gone again count once."""
    command = [sys.executable, "-c", KNOWN, f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=README.parent, capture_output=True, text=True, check=False)
    assert done.stderr.endswith("faster than expected: squares\n")
    blocks, squares = map(json.loads, done.stdout.splitlines())
    assert blocks["mib"] == pytest.approx([4, 8, 16, 32], rel=0.1)
    assert squares["mib"] == pytest.approx([4, 16, 64, 256], rel=0.1)
    assert [blocks["above"], squares["above"]] == [False, True]
    assert re.search(
        r"^\| squares \| 2 to 16 \| .* \| (1.9\d|2.0\d), 1 \| .* as a test", (tmp_path / "growth.md").read_text(), re.M
    )
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_every_cost_of_growth_runs_at_its_smallest(tmp_path, monkeypatch):
    monkeypatch.setattr(growth_costs, "SECONDS", (1, 15))
    costs = [*growth_costs.Parts(tmp_path).costs()]
    assert len({(cost.what, cost.against) for cost in costs}) == len(costs)
    for cost in costs:
        cost.prepare(cost.sizes[0])()


@pytest.fixture(scope="module")
def run_3b():
    """With every share and latency out of the way."""
    plain = "--peak 1e15 --reached 1 --products 1 --operator 0 --padding 0 --launch 0 --hop 0 --reading 0 --decoding 0"
    return scale.Run(scale.parse(plain.split()), official_sizes(n_layer=32, n_embd=2560))


def test_scale_counts_the_operations_of_a_step(run_3b):
    """The step against the formula of bench/train.py; WavLM-large by hand."""
    assert run_3b.step.flops == product_flops(run_3b.model, run_3b.batch)
    assert run_3b.batch.tokens == 4 * (round(9.4e6 * 1.3 / 281_241) + 1)
    samples, convolutions, channels = round(960.9 * 3600 / 281_241 * 16_000), 0, 1
    for kernel, stride in scale.CONVOLUTIONS:
        samples = (samples - kernel) // stride + 1
        convolutions += samples * 512 * channels * kernel
        channels = 512
    F, C = samples, 1024
    layer = F * (4 * C * C + 2 * C * 4096) + 2 * F * F * C + F * 16 * 64 * 8  # gates of the relative positions
    by_hand = convolutions + F * 512 * C + F * C * (C // 16) * 128 + 24 * layer
    assert run_3b.encode.flops == pytest.approx(2 * 4 * by_hand, rel=2e-3)


def test_scale_knows_what_checkpointing_computes_again():
    sizes = official_sizes(n_layer=2, n_embd=128)
    plain, again = (scale.Run(scale.parse([f"--grad_cp={i}"]), sizes) for i in (0, 1))
    blocks = 2 * (6 * 128**2 + 2 * 128 * sizes.dim_ffn + 2 * 128 * (5 * 32 + 64))
    assert again.step.flops - plain.step.flops == 2 * plain.batch.ids.numel() * blocks
    assert again.step.calls > plain.step.calls
    assert again.operator_seconds() / plain.operator_seconds() == pytest.approx((232 + 60) / 232)


def test_scale_has_the_memory_of_the_readme(run_3b, monkeypatch):
    row = re.search(r"^\| RWKV-6 3B \|.*\| ([\d.]+) GB, ([\d.]+) GB \|$", README.read_text(), re.M)
    for grad_cp, stated in enumerate(map(float, row.groups())):
        monkeypatch.setattr(run_3b.a, "grad_cp", grad_cp)
        assert run_3b.memory(1, cached=False) / 1e9 == pytest.approx(stated, abs=0.05)
    wavlm_large = 2 * 315_453_120  # bytes in bf16
    assert run_3b.memory(1, cached=False) - run_3b.memory(1, cached=True) == wavlm_large
    assert run_3b.memory(1, cached=True) - run_3b.memory(8, cached=True) == 8 * run_3b.trained * 7 / 8  # Adam's state


def test_scale_reckons_hours_by_hand(run_3b):
    """4 of 281,241 utterances of 12.3 s to a step: 70,311 steps, of the products at 1e15 FLOP/s and the operator."""
    positions = run_3b.batch.ids.numel()
    operator = 232e-6 / (4 * 256 * 40) * positions * 40 * 32
    step = run_3b.step.flops / 1e15 + operator
    assert run_3b.hours(1, cached=True) == (pytest.approx(70_311 * step / 3600), "products")
    # Of 21 M fp32 gradients, 7/8 are sent to be summed, and as many come back.
    exchange = 2 * 7 / 8 * 4 * run_3b.trained / 450e9
    assert run_3b.trained == 5 * 1024 * 2048 + 2048 + 2048 * 2560 + 2560 + 32 * 40 * 64 * 64
    assert run_3b.hours(8, cached=True) == (pytest.approx(8789 * (step + exchange) / 3600), "products")


def test_scale_finds_what_bounds_it(run_3b, monkeypatch):
    audio = 4 * 960.9 * 3600 / 281_241  # s to a GPU and step
    monkeypatch.setattr(run_3b.a, "storage", 10 * audio * 50 * 2048 / run_3b.hours(1, cached=True)[0] * 70_311 / 3600)
    assert [run_3b.hours(n, cached=True)[1] for n in (8, 16)] == ["products", "storage"]
    monkeypatch.setattr(run_3b.a, "launch", 1.0)
    assert run_3b.hours(1, cached=True) == (pytest.approx(70_311 * run_3b.step.calls / 3600), "launches")
    monkeypatch.setattr(run_3b.a, "decoding", 14e6 / audio)
    assert run_3b.hours(1, cached=False) == (pytest.approx(70_311 * 1e6 / 3600), "host's cores")
    assert scale.first(lambda n: n >= 37) == "37"
    text = "\n".join(scale.table(run_3b, "3B"))
    assert re.search(r"^ +64 +1099 .*launches", text, re.M)


def test_a_conversation_costs_the_same_in_each_round():
    command = [sys.executable, "bench/conversation.py", "--rounds", "2", "--conversations", "1"]
    done = subprocess.run(command, cwd=README.parent, capture_output=True, text=True, check=False)
    line = json.loads(done.stdout)
    assert len(line["file_bytes"]) == 1
    assert done.returncode == (line["last_over_first"] > 1.1)


def test_a_limit_is_measured_between_the_things_and_its_shortest_time_counts(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def thing(name, *taken):
        times = iter(taken)

        def run():
            order.append(name)
            clock[0] += next(times)

        return run

    ways = {"slow": thing("slow", *[9] * 12), "fast": thing("fast", 5, 5, 3, *[5] * 9)}
    found = timing.seconds({"a": thing("a", 100, 1, 2, 8)}, rounds=3, limits={"limit": ways})
    assert found == {"a": 2, "limit": 3}
    assert order == (["a"] + ["slow"] * 3 + ["fast"] * 3) * 4


def test_a_share_above_1_ends_a_benchmark():
    assert timing.share(1.0, 3.0, of="the memory bandwidth") == 0.333
    with pytest.raises(SystemExit, match=r"1\.500 of the memory bandwidth can't be"):
        timing.share(3.0, 2.0, of="the memory bandwidth")
