"""The CUDA kernels of the WKV operators: compiled by nvcc, run on a CPU under a stand-in, and on a GPU if there is one.

The stand-in (`cuda_stand_in/`) compiles `cuda/wkv6.cu` and `cuda/wkv7.cu` as C++ and runs the threads of a block in
random order between barriers. Values and all gradients are held against the fp64 loops of the references.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension
from wkv_cases import CASES
from wkv_cases import Case as Generation

from rwkv_speech.lm import wkv

CUDA = Path(__file__).parents[1] / "cuda"
STAND_IN = Path(__file__).parent / "cuda_stand_in"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # relative, in norm


@dataclass(frozen=True)
class Case:
    name: str  # wkv6 or wkv7
    B: int
    T: int
    H: int
    N: int
    dtype: str = "fp32"
    shared: bool = False  # one initial state for all samples
    lengths: tuple[int, ...] | None = None
    multiprocessors: int = 0  # that the stand-in claims: where there are many, wkv7 splits heads of 64 in two

    def __str__(self) -> str:
        lengths = "" if self.lengths is None else "-lengths" + "_".join(map(str, self.lengths))
        state, split = "-shared" * self.shared, "-split" * (self.multiprocessors > 0)
        return f"{self.name}-B{self.B}-T{self.T}-H{self.H}-N{self.N}-{self.dtype}{state}{lengths}{split}"

    @property
    def generation(self) -> Generation:
        return CASES[self.name]

    def inputs(self) -> list[Tensor]:
        """The operator's inputs and the state."""
        shape = self.B, self.T, self.H, self.N
        return [x.detach() for x in self.generation.inputs(*shape, dtype=DTYPES[self.dtype], shared=self.shared)]


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
    return dict(zip(case.generation.names, (*outputs, *gradients), strict=True))


def in_fp64(case: Case, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return by_autograd(case.generation.reference, case, inputs)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], case: Case) -> None:
    errors = {}
    for name in case.generation.names:
        difference = (got[name].detach().cpu().double() - want[name].detach().double()).norm()
        errors[name] = (difference / want[name].detach().double().norm().clamp_min(1e-30)).item()
    bound = BOUNDS[DTYPES[case.dtype]]
    assert all(error <= bound for error in errors.values()), errors  # a NaN is not <= either
    if case.lengths is not None:
        for b, length in enumerate(case.lengths):
            by_step = ("y", *(f"g{name}" for name in case.generation.operator.steps))
            assert all(not got[name][b, length:].any() for name in by_step)


# --- under the stand-in -----------------------------------------------------------------------------------------------


def structures(operator: wkv.Operator) -> tuple[type[ctypes.Structure], ...]:
    """Problem, Forward and Backward of wkv6.h or wkv7.h."""

    def structure(*fields: tuple[str, type] | str) -> type[ctypes.Structure]:
        fields = [(x, ctypes.c_void_p) if isinstance(x, str) else x for x in fields]
        return type("Arguments", (ctypes.Structure,), {"_fields_": fields})

    numbers = [(name, ctypes.c_int32) for name in ("B", "T", "H", "N", "dtype")]
    problem = structure(*numbers, "lengths", *operator.inputs)
    shared, slices = ("shared_state", ctypes.c_int32), ("slices", ctypes.c_int32)
    forward = structure(("problem", problem), "state", shared, "y", "final_state", "chunk_states")
    gradients = [f"g{name}" for name in operator.inputs]
    backward = ["chunk_states", "gy", "g_final_state", *gradients, "gstate", *[slices][: operator is wkv.WKV7], "parts"]
    return problem, forward, structure(("problem", problem), *backward)


STRUCTURES = {name: structures(of.operator) for name, of in CASES.items()}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The kernels compiled as C++, as a library."""
    library = tmp_path_factory.mktemp("stand_in") / "wkv.so"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O2", "-march=native", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    sources = ["-x", "c++", *(str(CUDA / f"{name}.cu") for name in CASES), str(STAND_IN / "driver.cpp")]
    subprocess.run(
        [compiler, *flags, f"-I{STAND_IN}", f"-I{CUDA}", *sources, "-o", str(library)], check=True, timeout=300
    )
    loaded = ctypes.CDLL(str(library))
    for name, (_, *ways) in STRUCTURES.items():
        for way, struct in zip(("forward", "backward"), ways, strict=True):
            function = loaded[f"{name}_{way}"]
            function.argtypes = (ctypes.POINTER(struct), ctypes.c_uint, ctypes.c_int)
            function.restype = ctypes.c_char_p
            setattr(loaded, f"{name}_{way}", function)
    loaded.wkv7_backward_slices.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int)
    return loaded


def run_stand_in(
    library: ctypes.CDLL, case: Case, inputs: Sequence[Tensor], *, seed: int, skipped_line: int = 0
) -> dict[str, Tensor]:
    """Forward and backward pass with threads in an order drawn from `seed`, without the barrier of `skipped_line`."""
    B, T, H, N, operator = case.B, case.T, case.H, case.N, case.generation.operator
    *inputs, state = (x.clone() for x in inputs)
    gy, g_final = output_gradients(case)
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    for b, length in enumerate(case.lengths or ()):
        for x in (*inputs[: len(operator.steps)], gy):
            x[b, length:] = torch.nan  # what lies after a sample's end must not be read

    def unset(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan)

    def output() -> Tensor:
        return torch.full_like(gy, torch.nan if lengths is None else 0)

    y, final_state, gstate = output(), unset(B, H, N, N), unset(B, H, N, N)
    gradients = [*(output() for _ in operator.steps), *(unset(B, H, N) for _ in operator.heads)]
    chunk_states = unset(B, H, -(-T // getattr(library, f"{case.name}_chunk")()), N, N)
    if case.name == "wkv6":
        slices, parts = [], unset(library.wkv6_slices(N), B, T, H, N)
    else:
        slices = [library.wkv7_backward_slices(N, B * H, case.multiprocessors)]
        parts = unset(5, *slices, B, T, H, N)

    def pointers(*tensors: Tensor) -> list[int]:
        return [x.data_ptr() for x in tensors]

    Problem, Forward, Backward = STRUCTURES[case.name]
    dtype = list(DTYPES).index(case.dtype)
    problem = Problem(B, T, H, N, dtype, None if lengths is None else lengths.data_ptr(), *pointers(*inputs))
    forward = Forward(problem, state.data_ptr(), case.shared, *pointers(y, final_state, chunk_states))
    given = pointers(chunk_states, gy, g_final, *gradients, gstate)
    backward = Backward(problem, *given, *slices, parts.data_ptr())
    for way, arguments in (("forward", forward), ("backward", backward)):
        complaint = getattr(library, f"{case.name}_{way}")(ctypes.byref(arguments), seed, skipped_line)
        assert complaint is None, complaint.decode()
    n = len(operator.steps)
    g_state = gstate.sum(0) if case.shared else gstate
    results = (y, final_state, *gradients[:n], *(x.sum(0) for x in gradients[n:]), g_state)
    return dict(zip(case.generation.names, results, strict=True))


def sizes() -> list[Case]:
    cases = []
    for name in CASES:
        cases += [Case(name, 1, T, 1, N) for N in (32, 64, 128) for T in (1, 2, 17, 129)]
        cases += [Case(name, 2, 17, 2, N, shared=True, lengths=(17, 6)) for N in (32, 64, 128)]
        cases += [Case(name, 2, 30, 2, 64, shared=shared) for shared in (False, True)]
        cases += [Case(name, 3, 50, 2, 32, shared=shared, lengths=(25, 50, 0)) for shared in (False, True)]
        cases += [Case(name, 2, 49, 1, 64, dtype, shared=True, lengths=(49, 24)) for dtype in ("bf16", "fp16")]
        cases += [Case(name, 1, 129, 1, N, dtype) for N in (32, 64, 128) for dtype in ("bf16", "fp16")]
    return cases


def split_sizes() -> list[Case]:
    """Those of RWKV-7 whose rows go to two blocks where multiprocessors are many."""
    return [replace(case, multiprocessors=132) for case in sizes() if case.name == "wkv7" and case.N == 64]


def large_sizes() -> list[Case]:
    """What the stand-in is too slow for."""
    large = (4, 256, 40, 64, "bf16"), (2, 1024, 2, 64)
    return [
        Case(name, *shape, shared=True, lengths=(1024, 700) if shape[0] == 2 else None)
        for name in CASES
        for shape in large
    ]


@pytest.mark.parametrize("case", [*sizes(), *split_sizes()], ids=str)
def test_stand_in_matches_reference(stand_in, case):
    inputs = case.inputs()
    assert_close(run_stand_in(stand_in, case, inputs, seed=case.T), in_fp64(case, inputs), case)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("N", [32, 64, 128], ids="N{}".format)
def test_any_order_of_threads_gives_the_same_bits(stand_in, name, N):
    case = Case(name, 2, 27, 2, N, shared=True, lengths=(27, 25), multiprocessors=132)
    results = [run_stand_in(stand_in, case, case.inputs(), seed=seed) for seed in range(4)]
    for output, first in results[0].items():
        assert all(torch.equal(result[output], first) for result in results[1:]), output


# Of RWKV-6 in fp32 the decay is 1 at w = -40, and 0 from w = 5 on; exp(w) itself overflows at w = 100.
EXTREMES = {"wkv6": [-40.0, 0.0, 5.0, 20.0, 100.0], "wkv7": [-torch.inf, -100.0, -20.0, 0.0, 20.0, 100.0, torch.inf]}


@pytest.mark.parametrize("name", CASES)
def test_extreme_decays(stand_in, name):
    case = Case(name, 1, 30, 1, 32)
    inputs, at = case.inputs(), case.generation.operator.inputs.index("w")
    choices = torch.tensor(EXTREMES[name])
    inputs[at] = choices[torch.randint(len(choices), inputs[at].shape, generator=torch.Generator().manual_seed(2))]
    assert_close(run_stand_in(stand_in, case, inputs, seed=0), in_fp64(case, inputs), case)


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors_expect_the_states_that_the_kernels_save(stand_in, name):
    assert CASES[name].operator.saved_every["cuda"] == getattr(stand_in, f"{name}_chunk")()


BARRIERS = {
    f"{name}-{re.sub(r'[^a-z0-9]+', '-', line.split('//')[1].strip())}": (name, number)
    for name in CASES
    for number, line in enumerate((CUDA / f"{name}.cu").read_text().splitlines(), start=1)
    if line.strip().startswith("__syncthreads();")
}


@pytest.mark.parametrize(("name", "line"), BARRIERS.values(), ids=BARRIERS.keys())
def test_a_missing_barrier_shows(stand_in, name, line):
    # bf16: threads stage eight values at a time and read four, so that each reads what others have staged.
    case = Case(name, 2, 2 * getattr(stand_in, f"{name}_chunk")() + 5, 1, 64, "bf16")
    inputs = case.inputs()
    want = in_fp64(case, inputs)
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
@pytest.mark.parametrize("name", CASES)
def test_nvcc_compiles_without_spills(nvcc, name, architecture, tmp_path):
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin"]
    command = [nvcc, *flags, *TORCH_FLAGS, str(CUDA / f"{name}.cu"), "-o", str(tmp_path / "wkv.cubin")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.stderr)
    # Three types and, of wkv6, three kernels for three head sizes; of wkv7, three forward, four backward (heads of 64
    # whole or split), and two that add two or eight parts.
    assert len(spills) == 27, built.stderr
    assert set(spills) == {("0", "0", "0")}, built.stderr


def test_binding_compiles(nvcc, tmp_path):
    includes = [path for path in cpp_extension.include_paths() if Path(path).is_dir()]
    if not any((Path(path) / "c10/cuda/impl/cuda_cmake_macros.h").exists() for path in includes):
        pytest.skip("this torch is built without CUDA and lacks the headers that the binding needs")
    command = [nvcc, "-x", "c++", "-std=c++20", "-c", "-Xcompiler", "-fsyntax-only,-Wall,-Werror"]
    for path in includes:
        command += ["-isystem", path]
    built = subprocess.run(
        [*command, str(CUDA / "wkv_cuda.cpp"), "-o", str(tmp_path / "binding.o")],
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
    inputs = case.inputs()
    got = by_autograd(case.generation.run, case, inputs, device="cuda")
    assert_close(got, in_fp64(case, inputs), case)


@pytest.mark.parametrize("name", CASES)
def test_gpu_opcheck(cuda_backend, name):
    inputs = [x.cuda().requires_grad_() for x in Case(name, 2, 40, 2, 32, shared=True).inputs()]
    operator = getattr(torch.ops.rwkv_speech, name)
    torch.library.opcheck(operator.default, (*inputs, torch.tensor([40, 7], device="cuda"), True))
