"""This file puts the jobs into a wheel as gvpo_ray/jobs; pyproject.toml says all the rest."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """BuildPy adds jobs, YAML files and the Python beside them, to the package's data.

    A checkout reads them where they are.
    """

    def _get_data_files(self):
        jobs = [path.name for kind in ("*.yaml", "*_cpu.py") for path in Path("jobs").glob(kind)]
        return [*super()._get_data_files(), ("gvpo_ray", "jobs", f"{self.build_lib}/gvpo_ray/jobs", jobs)]


setup(cmdclass={"build_py": BuildPy})
