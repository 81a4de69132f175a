"""What pyproject.toml cannot say: configs/ goes into the wheel as `qdora/configs`."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ beside the modules; an editable installation reads that of its checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "qdora", "configs")
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build, with files that are gone
            shutil.copytree("configs", target)


setup(cmdclass={"build_py": BuildWithConfigs})
