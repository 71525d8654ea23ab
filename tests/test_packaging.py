"""What an install ships. The tests marked ``packaging`` build for real; run them with
``python -m pytest tests/test_packaging.py -m packaging``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path | None = None, **environment: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def entries(sdist: Path) -> set[str]:
    """Files of an sdist, without its top folder."""
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def build(kind: str, out: Path, **environment: str) -> Path:
    run(
        sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out),
        str(ROOT), **environment,
    )  # fmt: skip
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("pure"), KDKERNELS_NATIVE="off")


def isolated(path: Path, wheel: Path) -> Path:
    """A virtual environment with only the wheel; torch and tools come from this interpreter's."""
    venv.create(path, with_pip=False)
    python = path / "bin" / "python"
    site = Path(run(str(python), "-c", "import site; print(site.getsitepackages()[0])").strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Last on the path, and without this project's editable finder.
    import torch

    outer = Path(torch.__file__).parents[1]
    (site / "outer.pth").write_text(f"import sys; sys.path.append({str(outer)!r})\n")
    return python


def test_source_folder_is_no_import_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import python_api"], cwd=ROOT, capture_output=True, text=True
    )
    assert "import kdkernels instead" in done.stderr


# Everything that an extra brings, and what only the command line needs.
ON_DEMAND = (
    *("accelerate", "gguf", "lightning", "matplotlib", "optuna", "peft", "psycopg", "rich"),
    *("safetensors", "scipy", "sqlalchemy", "tokenizers", "transformers", "triton", "typer"),
    *("yaml", "numpy"),
)


def test_import_is_cheap() -> None:
    """At most 0.3 s above ``import torch``: time of the processor, which other processes share."""
    program = (
        "import time, torch; start = time.process_time(); import kdkernels; "
        "print(time.process_time() - start)"
    )
    seconds = [float(run(sys.executable, "-c", program)) for _ in range(5)]
    assert statistics.median(seconds) < 0.3, seconds


def test_import_pulls_in_nothing_on_demand() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import kdkernels; "
        f"print([m for m in {ON_DEMAND} if m in sys.modules and m not in before])"
    )
    assert run(sys.executable, "-c", program).strip() == "[]"


def test_using_the_losses_pulls_in_nothing_on_demand() -> None:
    """A step on the CPU by the compiled kernels or the reference."""
    program = (
        "import sys, torch; before = set(sys.modules); import kdkernels; "
        "s = torch.randn(3, 7, requires_grad=True); "
        "kdkernels.kd_loss(s, torch.randn(3, 7), torch.tensor([0, 1, 2]), alpha=0.5).backward(); "
        "kdkernels.hidden_match_loss(s, torch.randn(3, 7)).backward(); "
        "kdkernels.WeightAverager(torch.nn.Linear(2, 2)).update(1); "
        f"print([m for m in {ON_DEMAND} if m in sys.modules and m not in before])"
    )
    assert run(sys.executable, "-c", program).strip() == "[]"


def test_broken_native_library_is_explained(tmp_path: Path) -> None:
    """Import works, the automatic choice falls back, an explicit request says why."""
    program = f"""
import pathlib, torch
broken = pathlib.Path({str(tmp_path)!r}) / "_native_cpu.so"
broken.write_text("no library")
import kdkernels._native as native
native._FOLDER = broken.parent
native._reasons["cpu"] = native._load("cpu")
import kdkernels
print(kdkernels.explain("kd_loss", torch.zeros(1, 2)))
kdkernels.kd_loss(torch.zeros(1, 2), torch.zeros(1, 2))
try:
    kdkernels.kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), backend="native")
except NotImplementedError as error:
    print(error)
"""
    output = run(sys.executable, "-c", program)
    assert output.startswith("kd_loss on cpu: reference")
    assert output.count("_native_cpu.so could not be loaded") == 2


@pytest.mark.packaging
def test_pure_wheel(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(pure_wheel).namelist()
    assert "kdkernels/api/functional.py" in names
    assert "kdkernels/bench/run.py" in names
    assert "kdkernels/py.typed" in names
    assert "kdkernels/ops/kd_loss/README.md" in names
    assert not [n for n in names if n.startswith(("python_api", "bench", "tests", "csrc"))]
    assert not [n for n in names if n.endswith(".so")]
    python = isolated(tmp_path / "env", pure_wheel)
    program = "import kdkernels; print(kdkernels.__file__, kdkernels.available_backends('kd_loss'))"
    output = run(str(python), "-P", "-c", program, cwd=tmp_path)
    assert str(tmp_path) in output and "native" not in output


@pytest.mark.packaging
def test_sdist_builds_a_working_native_wheel(tmp_path: Path) -> None:
    sdist = build("sdist", tmp_path / "sdist")
    names = entries(sdist)
    for needed in ("CMakeLists.txt", "csrc/kd_loss/kd_loss_cpu.cpp", "python_api/functional.py",
                   "bench/run.py", "setup.py", "LICENSE", "README.md"):  # fmt: skip
        assert needed in names
    assert not [n for n in names if n.endswith(".so")]
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    start = time.perf_counter()
    run(
        sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir",
        str(tmp_path / "wheel"), str(source), KDKERNELS_CUDA="off",
    )  # fmt: skip
    assert time.perf_counter() - start < 180  # 60 s on a quiet machine
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert "kdkernels/_native_cpu.so" in zipfile.ZipFile(wheel).namelist()
    python = isolated(tmp_path / "env", wheel)
    program = (
        "import torch, kdkernels; s = torch.randn(3, 7, requires_grad=True); "
        "kdkernels.kd_loss(s, torch.randn(3, 7), backend='native').backward(); "
        "print(kdkernels.__file__, kdkernels._native.host().build_info()['version'])"
    )
    output = run(str(python), "-P", "-c", program, cwd=tmp_path)
    assert str(tmp_path) in output and kdkernels_version() in output


def kdkernels_version() -> str:
    import kdkernels

    return kdkernels.__version__


@pytest.mark.packaging
def test_build_without_torch_says_so(tmp_path: Path) -> None:
    """One sentence instead of a traceback."""
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_ext']; "
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), "
        "{'__name__': '__main__', '__file__': 'setup.py'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "KDKERNELS_NATIVE": "on"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "needs torch" in done.stderr and "--no-build-isolation" in done.stderr
    assert "Traceback" not in done.stderr
