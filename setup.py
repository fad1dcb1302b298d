"""Builds the C++ parts with CMake, which holds the list of sources and flags, into the package.

Environment: QTOOLKIT_CUDA=auto|on|off, QTOOLKIT_TESTS=ON to build the C++ tests too,
QTOOLKIT_JOBS=<n> compilers at once (the usable cores by default), CMAKE_ARGS for more options.
"""

import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH = version("torch").split("+")[0]
# The CMake and ninja of this environment, also where it is not active: a system's may be too old.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CMakeBuild(build_ext):
    """Runs CMake and installs what it installs, and only that, into the package."""

    # What CMake installs goes there; besides, libraries go into the package's own folder.
    FOLDERS = ("include", "share")

    def run(self) -> None:
        # One build folder for each PyTorch and Python: switching between them rebuilds nothing.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{TORCH}"
        self.run_cmake(build)
        folder = self.package_folder(self.inplace)
        subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(folder)])
        manifest = (build / "install_manifest.txt").read_text().split("\n")
        self.installed = [str(Path(line).relative_to(folder)) for line in manifest if line]
        self.remove_others(folder)

    def remove_others(self, folder: Path) -> None:
        """What an earlier build left would be loaded, found by CMake, or be part of the wheel."""
        # In place, the modules of other Pythons stay.
        found = [*folder.glob("libqtoolkit_*.so" if self.inplace else "*.so")]
        found += [path for name in self.FOLDERS for path in (folder / name).rglob("*")]
        for path in found:
            if path.is_file() and str(path.relative_to(folder)) not in self.installed:
                path.unlink()

    def run_cmake(self, build: Path) -> None:
        import pybind11

        build.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(
            [
                "cmake",
                f"-S{ROOT}",
                f"-B{build}",
                "-GNinja",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DQTOOLKIT_OUTPUT={build / 'qtoolkit'}",
                f"-DQTOOLKIT_CUDA={os.environ.get('QTOOLKIT_CUDA', 'auto')}",
                f"-DQTOOLKIT_TESTS={os.environ.get('QTOOLKIT_TESTS', 'OFF')}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ]
        )
        jobs = os.environ.get("QTOOLKIT_JOBS", str(usable_cores()))
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", jobs])

    def package_folder(self, inplace: bool) -> Path:
        """The folder of the package: in the source tree, or in the tree that becomes the wheel."""
        if inplace:
            return ROOT / "python" / "qtoolkit"
        return Path(self.build_lib).resolve() / "qtoolkit"

    def get_outputs(self) -> list[str]:
        return [str(self.package_folder(False) / name) for name in self.installed]

    def get_output_mapping(self) -> dict[str, str]:
        """For an editable installation: where the files of a wheel are in the source tree."""
        if not self.inplace:
            return {}
        source = self.package_folder(True)
        return dict(zip(self.get_outputs(), (str(source / name) for name in self.installed)))


setup(
    ext_modules=[Extension("qtoolkit._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # The libraries fit the minor version of PyTorch that they were built against, and no other.
    install_requires=[f"torch=={'.'.join(TORCH.split('.')[:2])}.*", "numpy", "tqdm"],
)
