"""Prints what the environment of the Python that runs it lacks for this project; nothing where it has everything.

    python demo/setup/lacks.py [extra]

It reads requirements.txt and pyproject.toml and asks the installed packages' metadata, without importing any: a
fraction of a second. The project itself counts as there when `import rwkv_speech` finds the one of this folder.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def lacking(extra: str) -> list[str]:
    try:
        from packaging.requirements import Requirement  # several of the requirements bring it
    except ImportError:
        return ["the requirements"]

    def missing(text: str, extra: str = "") -> list[str]:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            return []
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            return [text]
        if not requirement.specifier.contains(found.version, prereleases=True):
            return [f"{text} (it has {found.version})"]
        # What an extra such as cuda-toolkit[nvcc] adds; the rest is the installer's business.
        inner = [line for line in found.requires or [] if "extra" in line]
        return [lack for name in sorted(requirement.extras) for line in inner for lack in missing(line, name)]

    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()]
    if extra:
        pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
        lines += pyproject["project"]["optional-dependencies"][extra]
    lacks = [lack for line in lines if line for lack in missing(line)]

    project = find_spec("rwkv_speech")
    if project is None or project.origin is None:
        lacks.append("rwkv-speech")
    elif not Path(project.origin).resolve().is_relative_to(ROOT):
        lacks.append(f"rwkv-speech of {ROOT} (it has that of {Path(project.origin).parent})")
    return lacks


if __name__ == "__main__":
    lacks = lacking(sys.argv[1] if len(sys.argv) > 1 else "")
    print(", ".join(lacks[:3]) + (f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""))
