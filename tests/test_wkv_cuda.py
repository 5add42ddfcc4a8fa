"""The CUDA kernels of the WKV operator: compiled by nvcc, run on a CPU under a stand-in, and on a GPU if there is one.

The stand-in (`cuda_stand_in/`) compiles `cuda/wkv6.cu` as C++ and runs the threads of a block in random order between
barriers. Values and all six gradients are held against the fp64 loops of the reference.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from rwkv_speech.lm import wkv
from rwkv_speech.lm.wkv6 import wkv6_reference

CUDA = Path(__file__).parents[1] / "cuda"
STAND_IN = Path(__file__).parent / "cuda_stand_in"
NAMES = ("y", "final_state", "gr", "gk", "gv", "gw", "gu", "g_state")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # relative, in norm


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    H: int
    N: int
    dtype: str = "fp32"
    shared: bool = False  # one initial state for all samples
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        lengths = "" if self.lengths is None else "-lengths" + "_".join(map(str, self.lengths))
        state = "-shared" if self.shared else ""
        return f"B{self.B}-T{self.T}-H{self.H}-N{self.N}-{self.dtype}{state}{lengths}"


def make_inputs(case: Case, *, seed: int = 0) -> list[Tensor]:
    """r, k, v, w, u, state; decays from one that forgets at once (w = 3) to one that hardly forgets (w = -7)."""
    B, T, H, N = case.B, case.T, case.H, case.N
    g = torch.Generator().manual_seed(seed)
    r, k, v = torch.randn(3, B, T, H, N, generator=g).to(DTYPES[case.dtype])
    w = (torch.rand(B, T, H, N, generator=g) * 10 - 7).to(DTYPES[case.dtype])
    u = torch.randn(H, N, generator=g)
    state = torch.randn((H, N, N) if case.shared else (B, H, N, N), generator=g)
    return [r, k, v, w, u, state]


def output_gradients(case: Case, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    gy = torch.randn(case.B, case.T, case.H, case.N, generator=g).to(DTYPES[case.dtype])
    return gy, torch.randn(case.B, case.H, case.N, case.N, generator=g)


def by_autograd(operator: Callable, case: Case, inputs: Sequence[Tensor], *, device: str = "cpu") -> dict[str, Tensor]:
    inputs = [x.to(device, copy=True).requires_grad_() for x in inputs]
    lengths = None if case.lengths is None else torch.tensor(case.lengths, device=device)
    outputs = operator(*inputs, lengths)
    grad_outputs = [g.to(device, x.dtype) for g, x in zip(output_gradients(case), outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, inputs, grad_outputs)
    return dict(zip(NAMES, (*outputs, *gradients), strict=True))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], case: Case) -> None:
    errors = {}
    for name in NAMES:
        difference = (got[name].detach().cpu().double() - want[name].detach().double()).norm()
        errors[name] = (difference / want[name].detach().double().norm().clamp_min(1e-30)).item()
    bound = BOUNDS[DTYPES[case.dtype]]
    assert all(error <= bound for error in errors.values()), errors  # a NaN is not <= either
    if case.lengths is not None:
        for b, length in enumerate(case.lengths):
            assert all(not got[name][b, length:].any() for name in ("y", "gr", "gk", "gv", "gw"))


# --- under the stand-in -----------------------------------------------------------------------------------------------


class Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("B", "T", "H", "N", "dtype")),
        *((name, ctypes.c_void_p) for name in ("r", "k", "v", "w", "u", "lengths")),
    )


class Forward(ctypes.Structure):
    _fields_ = (
        ("problem", Problem),
        ("state", ctypes.c_void_p),
        ("shared_state", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("y", "final_state", "chunk_states")),
    )


class Backward(ctypes.Structure):
    _fields_ = (
        ("problem", Problem),
        *((name, ctypes.c_void_p) for name in ("chunk_states", "gy", "g_final_state", "gr", "gk", "gv", "gw")),
        *((name, ctypes.c_void_p) for name in ("gu", "gstate", "gv_parts")),
    )


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """`cuda/wkv6.cu` compiled as C++, as a library."""
    library = tmp_path_factory.mktemp("stand_in") / "wkv6.so"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O2", "-march=native", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    sources = ["-x", "c++", str(CUDA / "wkv6.cu"), str(STAND_IN / "driver.cpp")]
    subprocess.run(
        [compiler, *flags, f"-I{STAND_IN}", f"-I{CUDA}", *sources, "-o", str(library)], check=True, timeout=300
    )
    loaded = ctypes.CDLL(str(library))
    for function, struct in ((loaded.wkv6_forward, Forward), (loaded.wkv6_backward, Backward)):
        function.argtypes = (ctypes.POINTER(struct), ctypes.c_uint, ctypes.c_int)
        function.restype = ctypes.c_char_p
    return loaded


def run_stand_in(
    library: ctypes.CDLL, case: Case, inputs: Sequence[Tensor], *, seed: int, skipped_line: int = 0
) -> dict[str, Tensor]:
    """Forward and backward pass with threads in an order drawn from `seed`, without the barrier of `skipped_line`."""
    B, T, H, N = case.B, case.T, case.H, case.N
    r, k, v, w, u, state = (x.clone() for x in inputs)
    gy, g_final = output_gradients(case)
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    for b, length in enumerate(case.lengths or ()):
        for x in (r, k, v, w, gy):
            x[b, length:] = torch.nan  # what lies after a sample's end must not be read

    def unset(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan)

    def output() -> Tensor:
        return torch.full_like(r, torch.nan if lengths is None else 0)

    y, gr, gk, gv, gw = (output() for _ in range(5))
    final_state, gstate, gu = unset(B, H, N, N), unset(B, H, N, N), unset(B, H, N)
    chunk_states = unset(B, H, -(-T // library.wkv6_chunk()), N, N)
    gv_parts = unset(library.wkv6_gv_slices(N), B, T, H, N)

    def pointers(*tensors: Tensor) -> list[int]:
        return [x.data_ptr() for x in tensors]

    dtype = list(DTYPES).index(case.dtype)
    problem = Problem(B, T, H, N, dtype, *pointers(r, k, v, w, u), None if lengths is None else lengths.data_ptr())
    forward = Forward(problem, state.data_ptr(), case.shared, *pointers(y, final_state, chunk_states))
    backward = Backward(problem, *pointers(chunk_states, gy, g_final, gr, gk, gv, gw, gu, gstate, gv_parts))
    for function, arguments in ((library.wkv6_forward, forward), (library.wkv6_backward, backward)):
        complaint = function(ctypes.byref(arguments), seed, skipped_line)
        assert complaint is None, complaint.decode()
    g_state = gstate.sum(0) if case.shared else gstate
    return dict(zip(NAMES, (y, final_state, gr, gk, gv, gw, gu.sum(0), g_state), strict=True))


def sizes() -> list[Case]:
    cases = [Case(1, T, 1, N) for N in (32, 64, 128) for T in (1, 2, 17, 129)]
    cases += [Case(2, 17, 2, N, shared=True, lengths=(17, 6)) for N in (32, 64, 128)]
    cases += [Case(2, 30, 2, 64, shared=shared) for shared in (False, True)]
    cases += [Case(3, 50, 2, 32, shared=shared, lengths=(25, 50, 0)) for shared in (False, True)]
    cases += [Case(2, 49, 1, 64, dtype, shared=True, lengths=(49, 24)) for dtype in ("bf16", "fp16")]
    cases += [Case(1, 129, 1, N, dtype) for N in (32, 64, 128) for dtype in ("bf16", "fp16")]
    return cases


def large_sizes() -> list[Case]:
    """What the stand-in is too slow for."""
    return [Case(4, 256, 40, 64, "bf16", shared=True), Case(2, 1024, 2, 64, shared=True, lengths=(1024, 700))]


@pytest.mark.parametrize("case", sizes(), ids=str)
def test_stand_in_matches_reference(stand_in, case):
    inputs = make_inputs(case)
    assert_close(run_stand_in(stand_in, case, inputs, seed=case.T), by_autograd(wkv6_reference, case, inputs), case)


@pytest.mark.parametrize("N", [32, 64, 128], ids="N{}".format)
def test_any_order_of_threads_gives_the_same_bits(stand_in, N):
    case = Case(2, 27, 2, N, shared=True, lengths=(27, 25))
    results = [run_stand_in(stand_in, case, make_inputs(case), seed=seed) for seed in range(4)]
    for name in NAMES:
        assert all(torch.equal(result[name], results[0][name]) for result in results[1:]), name


def test_extreme_decays(stand_in):
    # In fp32 the decay is 1 at w = -40, and 0 from w = 5 on; exp(w) itself overflows at w = 100.
    case = Case(1, 30, 1, 32)
    r, k, v, w, u, state = make_inputs(case)
    g = torch.Generator().manual_seed(2)
    w = torch.tensor([-40.0, 0.0, 5.0, 20.0, 100.0])[torch.randint(5, w.shape, generator=g)]
    inputs = [r, k, v, w, u, state]
    assert_close(run_stand_in(stand_in, case, inputs, seed=0), by_autograd(wkv6_reference, case, inputs), case)


BARRIERS = [
    (number, line.split("//")[1].strip())
    for number, line in enumerate((CUDA / "wkv6.cu").read_text().splitlines(), start=1)
    if line.strip().startswith("__syncthreads();")
]


@pytest.mark.parametrize(
    "line", [line for line, _ in BARRIERS], ids=[re.sub(r"\W+", "-", name) for _, name in BARRIERS]
)
def test_a_missing_barrier_shows(stand_in, line):
    # bf16: threads stage eight values at a time and read four, so that each reads what others have staged.
    case = Case(2, 2 * stand_in.wkv6_chunk() + 5, 1, 64, "bf16")
    inputs = make_inputs(case)
    want = by_autograd(wkv6_reference, case, inputs)
    assert_close(run_stand_in(stand_in, case, inputs, seed=0), want, case)
    with pytest.raises(AssertionError):
        assert_close(run_stand_in(stand_in, case, inputs, seed=0, skipped_line=line), want, case)


# --- by nvcc ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvcc() -> str:
    """The nvcc on the PATH, else the one of the PyPI packages nvidia-cuda-nvcc and nvidia-cuda-cccl."""
    on_path = shutil.which("nvcc")
    if on_path:
        return on_path
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc"))
    assert packaged, "there is no nvcc: pip install nvidia-cuda-nvcc nvidia-cuda-cccl"
    return str(packaged[-1])


# torch's extension loader compiles CUDA sources with these.
TORCH_FLAGS = (
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_without_spills(nvcc, architecture, tmp_path):
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin"]
    command = [nvcc, *flags, *TORCH_FLAGS, str(CUDA / "wkv6.cu"), "-o", str(tmp_path / "wkv6.cubin")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.stderr)
    assert len(spills) == 27, built.stderr  # three kernels, three types, three head sizes
    assert set(spills) == {("0", "0", "0")}, built.stderr


def test_binding_compiles(nvcc, tmp_path):
    includes = [path for path in cpp_extension.include_paths() if Path(path).is_dir()]
    if not any((Path(path) / "c10/cuda/impl/cuda_cmake_macros.h").exists() for path in includes):
        pytest.skip("this torch is built without CUDA and lacks the headers that the binding needs")
    command = [nvcc, "-x", "c++", "-std=c++20", "-c", "-Xcompiler", "-fsyntax-only,-Wall,-Werror"]
    for path in includes:
        command += ["-isystem", path]
    built = subprocess.run(
        [*command, str(CUDA / "wkv6_cuda.cpp"), "-o", str(tmp_path / "binding.o")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_backend():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here: the kernels ran under the stand-in only")
    wkv.set_backend("cuda")
    yield
    wkv.set_backend("auto")


@pytest.mark.parametrize("case", [*sizes(), *large_sizes()], ids=str)
def test_gpu_matches_reference(cuda_backend, case):
    inputs = make_inputs(case)
    assert_close(by_autograd(wkv.wkv6, case, inputs, device="cuda"), by_autograd(wkv6_reference, case, inputs), case)


def test_gpu_saves_a_state_per_chunk(cuda_backend):
    # The backend's chunk, which fake tensors go by, is that of the kernels.
    inputs = [x.cuda() for x in make_inputs(Case(1, 100, 1, 64))]
    _, _, saved = torch.ops.rwkv_speech.wkv6(*inputs, None, True)
    assert saved.shape[2] == -(-100 // wkv.backend("cuda").chunk)
