"""This file puts the jobs into a wheel as gvpo_ray/jobs; pyproject.toml says all the rest."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """BuildPy adds jobs, YAML files and what Python they name, to the package's data.

    A checkout reads them where they are.
    """

    def _get_data_files(self):
        files = [*Path("jobs").glob("*.yaml"), *Path("jobs").glob("*.py")]
        jobs = [path.name for path in files if path.with_suffix(".yaml").exists()]
        return [*super()._get_data_files(), ("gvpo_ray", "jobs", f"{self.build_lib}/gvpo_ray/jobs", jobs)]


setup(cmdclass={"build_py": BuildPy})
