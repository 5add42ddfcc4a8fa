"""A plain installation: what its wheel holds, by way of the source distribution, and that it computes."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = ("src", "cuda", "pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "README.md", "LICENSE")

# What pip calls, too (PEP 517).
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"

COMPUTE = """
import os, sys
from pathlib import Path
import rwkv_speech
from rwkv_speech.lm import extension, wkv
site = Path(sys.argv[1])
assert Path(rwkv_speech.__file__).is_relative_to(site)
assert extension.SOURCES == site / "rwkv_speech/cuda"
assert (site / "rwkv_speech/serve/page/index.html").is_file()
assert wkv.backend("cpu").name == "cpu"
# And where nothing can be built:
os.environ |= {"CXX": "no-compiler", "XDG_CACHE_HOME": str(site / "cache")}
extension.load_cpu.cache_clear()
wkv._choose.cache_clear()
assert [wkv.backend("cpu", operator).name for operator in (wkv.WKV6, wkv.WKV7)] == ["torch", "torch"]
os.environ |= {"CXX": "c++", "XDG_CACHE_HOME": "/dev/null"}
wkv._choose.cache_clear()
assert wkv.backend("cpu").name == "torch"
extension.SOURCES = site / "nowhere"
wkv._choose.cache_clear()
assert wkv.backend("cpu").name == "torch"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder that a plain installation fills, without a network and away from the checkout."""
    folder = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in PROJECT:
        here, there = ROOT / name, folder / "copy" / name
        there.parent.mkdir(exist_ok=True)
        shutil.copytree(here, there, ignore=ignored) if here.is_dir() else shutil.copy(here, there)

    def build(kind: str, source: Path) -> Path:
        subprocess.run([sys.executable, "-c", BUILD, kind, folder / kind], cwd=source, check=True, capture_output=True)
        (built,) = (folder / kind).iterdir()
        return built

    sdist = build("sdist", folder / "copy")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    with zipfile.ZipFile(build("wheel", folder / "unpacked" / sdist.name.removesuffix(".tar.gz"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_package_and_the_sources_of_its_operators(site):
    def contents(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    expected = contents(ROOT / "src/rwkv_speech")
    expected |= {f"cuda/{name}": content for name, content in contents(ROOT / "cuda").items()}
    assert contents(site / "rwkv_speech") == expected
    assert {path.name for path in site.iterdir()} == {"rwkv_speech", "rwkv_speech-0.1.0.dist-info"}


def test_it_builds_its_operators_or_says_once_that_it_cannot(site):
    command = [sys.executable, "-c", COMPUTE, site]
    done = subprocess.run(
        command, cwd=site.parent, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "plain torch" in line]
    assert len(said) == 3
    assert "there is no C++ compiler (no-compiler)" in said[0]
    assert "Not a directory; name a folder that can be written to by TORCH_EXTENSIONS_DIR" in said[1]
    assert "its sources are not in" in said[2]
