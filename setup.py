"""Builds the C++ parts with CMake, which holds the list of sources and flags, into the package.

Environment: QTOOLKIT_CUDA=auto|on|off, QTOOLKIT_TESTS=ON to build the C++ tests too,
QTOOLKIT_JOBS=<n> compilers at once (the number of cores by default), CMAKE_ARGS for more options.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake; the outputs go into the source package (editable) or the wheel's."""

    def run(self) -> None:
        # setuptools' own run() builds elsewhere when in place and copies only the Python module to
        # the package; the operator library belongs beside it.
        for ext in self.extensions:
            self.build_extension(ext)

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One build folder for each PyTorch and Python: switching between them rebuilds nothing.
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__.split('+')[0]}"
        build = ROOT / "build" / tag
        build.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(
            [
                "cmake",
                f"-S{ROOT}",
                f"-B{build}",
                "-GNinja",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DQTOOLKIT_OUTPUT={output}",
                f"-DQTOOLKIT_CUDA={os.environ.get('QTOOLKIT_CUDA', 'auto')}",
                f"-DQTOOLKIT_TESTS={os.environ.get('QTOOLKIT_TESTS', 'OFF')}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ]
        )
        jobs = os.environ.get("QTOOLKIT_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", jobs])


setup(ext_modules=[Extension("qtoolkit._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
