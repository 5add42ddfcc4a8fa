"""The rest is in pyproject.toml, which can't say that a folder outside of src/ belongs into the package."""

import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Takes along the sources of the operators: lm/extension.py builds them where they are used."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("cuda", f"{self.build_lib}/rwkv_speech/cuda", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildPy})
