"""The report on machine code finds what it is for: kernels planted with one fault each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kdkernels.bench import machine_code
from kdkernels.bench.compiled import Entry, cuda_entries

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

CUDA = r"""
extern "C" __global__ void sound(const float4* in, float4* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = in[i];
}
extern "C" __global__ void narrow(const float* in, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = 2.0f * in[i];
}
extern "C" __global__ void local(const int* in, int* out, int n) {
  int count[64] = {};
  for (int i = 0; i < n; ++i) ++count[in[i] & 63];
  for (int i = 0; i < 64; ++i) out[i] = count[i];
}
extern "C" __global__ void spilled(const float* in, float* out) {
  float x[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = x[95 - i] * x[i];
}
"""
FAULTS = {
    "sound": [],
    "narrow": ["a loop that loads only 32 bits", "no load wider than 32 bits"],
    "local": ["bytes of stack", "accesses to local memory", "a loop that loads only 32 bits"],
    "spilled": ["bytes of stack", "accesses to local memory"],
}


@needs_nvcc
@needs_triton
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
def test_planted_faults_of_cuda_kernels(tmp_path: Path, architecture: str) -> None:
    source, cubin = tmp_path / "planted.cu", tmp_path / "planted.cubin"
    source.write_text(CUDA)
    assert NVCC is not None
    command = [
        NVCC,
        "-cubin",
        "-maxrregcount=32",
        f"-arch={architecture}",
        str(source),
        "-o",
        str(cubin),
    ]
    subprocess.run(command, check=True)
    kernels = {kernel.name: kernel for kernel in machine_code.kernels(cubin)}
    assert kernels.keys() == FAULTS.keys()
    for name, wanted in FAULTS.items():
        faults = Entry("planted", "native", "", True, kernels[name]).faults()
        assert bool(faults) == bool(wanted), (name, faults)
        for text in wanted:
            assert any(text in fault for fault in faults), (name, text, faults)
    # Where rows are not walked over, any width will do.
    assert Entry("planted", "native", "", False, kernels["narrow"]).faults() == []


TRITON = """
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def spilled(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.load(x + at)
    tl.debug_barrier()
    total = tl.sum(row)
    for i in range(8):
        total += tl.sum(tl.exp(row * total))
    tl.store(y + at, row * total)


source = ASTSource(spilled, {"x": "*fp32", "y": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 16384})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
open(sys.argv[1], "wb").write(compiled.asm["cubin"])
"""


@needs_triton
def test_planted_spill_of_a_triton_kernel(tmp_path: Path) -> None:
    script, cubin = tmp_path / "planted.py", tmp_path / "planted.cubin"
    script.write_text(TRITON)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, str(script), str(cubin)], check=True, env=environment)
    (kernel,) = machine_code.kernels(cubin)
    faults = Entry("planted", "triton", "", False, kernel).faults()
    assert len(faults) == 2 and "bytes of stack" in faults[0], faults


def test_a_library_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="compiled: nothing.so must have been built"):
        cuda_entries(tmp_path / "nothing.so")
