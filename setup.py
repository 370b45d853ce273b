"""Adds the shipped configurations to the built package; everything else is in pyproject.toml."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigurations(build_py):
    """Copies `config/*.example` and `config/examples` into the package.

    An editable install reads them where they lie. The rest of `config/` is the user's own.
    """

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return
        shipped = Path(self.build_lib, "simpletuner", "shipped")
        copytree("config/examples", shipped / "examples", dirs_exist_ok=True)
        for file in Path("config").glob("*.example"):
            self.copy_file(file, shipped / file.name)


setup(cmdclass={"build_py": BuildWithConfigurations})
