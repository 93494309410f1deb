"""What travels in the wheel beside the packages: recipes, and what installs the toolchains, as `featherweight/shipped`."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "infra/toolchains", "infra/bootstrap.py", "infra/build_llama_cpp.py")


class WithShipped(build_py):
    """An editable installation finds them in the checkout."""

    def run(self) -> None:
        super().run()
        for name in () if self.editable_mode else SHIPPED:
            source, target = Path(name), Path(self.build_lib, "featherweight", "shipped", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)


setup(cmdclass={"build_py": WithShipped})
