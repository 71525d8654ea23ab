"""Drives CMake and maps the packages; metadata is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# Source folders whose import names differ from their folder names.
MAPPED = {"kdkernels.api": "python_api", "kdkernels.bench": "bench"}
PACKAGES = [
    *find_packages(include=["kdkernels", "kdkernels.*"]),
    *MAPPED,
    *(f"{name}.{sub}" for name, folder in MAPPED.items() for sub in find_packages(folder)),
]


class CMakeBuild(build_ext):
    """Builds every native library with one CMake run and puts them into the package."""

    def run(self) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            sys.exit(
                f"kdkernels: building the native libraries needs {error.name}: install torch, "
                "pybind11 and ninja first and pass --no-build-isolation to pip, or set "
                "KDKERNELS_NATIVE=off for a pure-Python install"
            )
        package = ROOT / "kdkernels" if self.inplace else Path(self.build_lib) / "kdkernels"
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.version_info[1]}"
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("KDKERNELS_BUILD_TYPE", "Release"),
            "KDKERNELS_CUDA": os.environ.get("KDKERNELS_CUDA", "auto"),
            "KDKERNELS_VERSION": self.distribution.get_version(),
            "TORCH_ROOT": Path(torch.__file__).parent,
            "TORCH_VERSION": torch.__version__,
            "PYBIND11_INCLUDE": pybind11.get_include(),
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "CMAKE_INSTALL_PREFIX": package.resolve(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        # Unset again, the default counts, not what CMake remembers.
        architectures = os.environ.get("KDKERNELS_CUDA_ARCHITECTURES")
        name = "KDKERNELS_CUDA_ARCHITECTURES"
        defines += [f"-D{name}={architectures}"] if architectures else ["-U", name]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines],
            ["cmake", "--build", str(build), "--parallel", jobs],
        ):
            subprocess.run(command, check=True)
        # What an earlier build with other options left must not be loaded beside this one.
        for stale in (*package.glob("_native_*.so"), *package.glob("_host*.so")):
            stale.unlink()
        subprocess.run(["cmake", "--install", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return []


NATIVE = os.environ.get("KDKERNELS_NATIVE", "on") != "off"

setup(
    packages=PACKAGES,
    package_dir=MAPPED,
    package_data={
        "kdkernels": ["py.typed"],
        "kdkernels.ops": ["*/README.md"],
        "kdkernels.api.cache": ["README.md"],
        "kdkernels.api.hf": ["README.md"],
    },
    # The extension only tells setuptools that the wheel holds compiled files; CMake names them.
    ext_modules=[Extension("kdkernels._host", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild} if NATIVE else {},
)
