"""The op tests over CPU kernels and emulated CUDA kernels under AddressSanitizer and UBSan.

``make test-sanitize``. Both libraries are built anew, under ``build/sanitize``; a report ends its
process, of which there is one for each core, and fails the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
FOLDER = ROOT / "build" / "sanitize"
SANITIZERS = "address,undefined"
# GCC marks what leaves its scope while an exception passes, and nothing takes the mark off the
# stack: a later call that has a variable there is reported, now and then.
FLAGS = ("-fno-sanitize-address-use-after-scope",)
# The other backends have nothing that could be instrumented, torch.compile takes minutes under the
# sanitizers, and one dtype goes through all layouts of the launch plan.
CHOSEN = "(native or emulat) and not compile and not (test_layouts and (float32 or bfloat16))"
TESTS = ("tests/ops", "tests/emulation/test_emulation.py", "-k", CHOSEN)


def build_cpu() -> None:
    """``_native_cpu.so`` with the sanitizers."""
    import torch

    defines = {
        "CMAKE_BUILD_TYPE": "Release",
        # At -O3 the checks make compiling take three times as long.
        "CMAKE_CXX_FLAGS_RELEASE": " ".join(["-O1 -DNDEBUG", *FLAGS]),
        "KDKERNELS_CUDA": "off",
        "KDKERNELS_SANITIZE": SANITIZERS,
        "TORCH_ROOT": Path(torch.__file__).parent,
    }
    options = [f"-D{name}={value}" for name, value in defines.items()]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja", *options],
        ["cmake", "--build", str(FOLDER), "--target", "_native_cpu"],
    ):
        subprocess.run(command, check=True)


def build_emulated() -> Path:
    """The emulated kernels with the sanitizers; their flags take the place of our own checks."""
    from emulation import backend

    flags = (f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-g1", *FLAGS)
    flags += backend.SCALAR
    path, reason = backend.build(folder=FOLDER, flags=flags, everywhere=True)
    if reason is not None:
        sys.exit(reason)
    return path


def run_tests(emulated: Path, arguments: list[str]) -> int:
    """Runs pytest with the sanitizers' run-time library in front of all others."""

    def library(name: str) -> str:
        command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    # Into files: pytest keeps what a process prints until its test ends, and a report is the end of
    # both.
    for old in FOLDER.glob("report.*"):
        old.unlink()
    reports = f"log_path={FOLDER / 'report'}"
    environment = os.environ | {
        "KDKERNELS_LIBRARIES": str(FOLDER),
        "KDKERNELS_EMULATED": str(emulated),
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        # Python and torch keep memory until the process ends; fibers switch stacks.
        "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:{reports}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{reports}",
    }
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal"]
    command += ["-m", "not slow", *(arguments or TESTS)]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    for report in sorted(FOLDER.glob("report.*")) if status != 0 else ():
        print(report.name, report.read_text(errors="replace"), sep="\n")
    return status


if __name__ == "__main__":
    build_cpu()
    sys.exit(run_tests(build_emulated(), sys.argv[1:]))
