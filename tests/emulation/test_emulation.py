"""The CUDA kernels on the CPU: every layout of the launch plan, any order of threads, and the
proof that a missing barrier is found.

The op tests cover the numerics of the backend ``emulated`` at the plan of one GPU; here the
emulated GPU varies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulation import backend, find_mutant
from emulation.cases import LAYOUTS, SEEDS, Expected, device_for, make

from kdkernels.ops.kd_loss.op import kd_loss_forward, kd_loss_grad, kd_loss_grad_
from kdkernels.ops.kd_loss.spec import Divergence, Spec, Tail
from kdkernels.ops.topk_kd_loss.op import (
    topk_kd_loss_forward,
    topk_kd_loss_grad,
    topk_kd_loss_grad_,
)
from kdkernels.ops.topk_kd_loss.reference import topk_kd_loss_reference

REASON = backend.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("divergence", list(Divergence), ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts(layout: str, divergence: Divergence, dtype: torch.dtype) -> None:
    torch.manual_seed(divergence)
    classes, stride = 1100, 1103  # rows off the 16-byte boundaries
    student = make(4, classes, dtype, stride=stride)
    needs_teacher = Divergence.FORWARD_KL <= divergence <= Divergence.TVD
    teacher = make(4, classes, dtype, stride=stride) if needs_teacher else None
    labels = torch.tensor([0, -100, 1089, 600])
    student[1] = torch.nan
    weights = torch.rand(4)
    spec = Spec(
        divergence.value, 0.3, 0.7, 0.4, 0.6, 0.1, 1e-3, 0.9, 1.1, 20.0, 0.0, classes=classes - 10
    )
    expected = Expected(student, teacher, labels, weights, None, spec)
    gpu = device_for(LAYOUTS[layout], classes - 10, dtype.itemsize, 1 + needs_teacher)
    args = (student, teacher, labels, weights, None, spec)
    for seed in SEEDS:
        with backend.device(**gpu, seed=seed):
            got = kd_loss_grad("emulated", *args)
            expected.check(got[0], grad=got[2])
            assert (got[2][1] == 0).all() and (got[2][:, -10:] == 0).all()
            again = kd_loss_forward("emulated", *args)
            expected.check(again[0], rows=again[2])
            over = torch.full((4, stride), torch.nan, dtype=dtype)[:, :classes].copy_(student)
            kd_loss_grad_("emulated", over, *args[1:])
            assert torch.equal(over, got[2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", [Tail.BUCKET, Tail.UNIFORM], ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_a_list(layout: str, tail: Tail, dtype: torch.dtype) -> None:
    torch.manual_seed(tail)
    classes, stride, entries = 1100, 1103, 40
    student = make(4, classes, dtype, stride=stride)
    # Entries in every block of the cluster, one of them twice, one that does not count.
    ids = torch.rand(4, classes - 10).argsort(1)[:, :entries].contiguous()
    ids[:, 7], ids[:, 9], ids[2] = ids[:, 3], -1, ids[2].sort().values
    logprobs = torch.randn(4, entries).log_softmax(1) - 0.3
    labels = torch.tensor([int(ids[0, 5]), -100, 1089, 600])
    student[1] = torch.nan
    top = float((20.0 * (0.9 * student.float() / 20.0).tanh() / 0.7).softmax(1)[[0, 2, 3]].max())
    unit = top * (0.4 + 0.6 / 0.7) / 3  # three valid rows
    for divergence in (Divergence.FORWARD_KL, Divergence.REVERSE_KL):
        spec = Spec(
            divergence.value, 0.5, 0.7, 0.4, 0.6, 0.1, 1e-3, 0.9, 1.0, 20.0,
            classes=classes - 10, tail=int(tail),
        )  # fmt: skip
        args = (student, ids, logprobs, labels, torch.rand(4), None, spec)
        expected = Expected(*args, reference=topk_kd_loss_reference)
        gpu = device_for(LAYOUTS[layout], classes - 10, dtype.itemsize, 1, entries)
        for seed in SEEDS:
            with backend.device(**gpu, seed=seed):
                got = topk_kd_loss_grad("emulated", *args)
                expected.check(got[0], grad=got[2], unit=unit)
                again = topk_kd_loss_forward("emulated", *args)
                expected.check(again[0], rows=again[2])
                over = torch.full((4, stride), torch.nan, dtype=dtype)[:, :classes].copy_(student)
                topk_kd_loss_grad_("emulated", over, *args[1:])
                assert torch.equal(over, got[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_models_have_no_gradient(layout: str) -> None:
    student = make(2, 1000, torch.bfloat16)
    D = Divergence
    for divergence in (D.FORWARD_KL, D.REVERSE_KL, D.JSD, D.TVD):
        spec = Spec(divergence=divergence.value, kd_weight=4.0, temperature=2.0, beta=0.3)
        with backend.device(**device_for(LAYOUTS[layout], 1000, 2), seed=3):
            loss, _, grad = kd_loss_grad(
                "emulated", student, student.clone(), None, None, None, spec
            )
        assert loss == 0 and (grad == 0).all()


def test_order_of_threads_changes_no_bit() -> None:
    student, teacher = make(3, 2000, torch.float16), make(3, 2000, torch.float16)
    spec = Spec(divergence=Divergence.JSD.value, kd_weight=1.0)
    results = []
    for seed in range(8):
        with backend.device(**device_for(4, 2000, 2), seed=seed):
            results.append(kd_loss_grad("emulated", student, teacher, None, None, None, spec))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_no_clusters_before_hopper() -> None:
    student = make(2, 4000, torch.float32)
    spec = Spec(ce_weight=1.0)
    labels = torch.tensor([5, 3999])
    expected = Expected(student, None, labels, None, None, spec)
    with backend.device(major=8, shared=device_for(8, 4000, 4, 1)["shared"]):
        got = kd_loss_grad("emulated", student, None, labels, None, None, spec)
    expected.check(got[0], grad=got[2])


def test_unchanged_kernels_pass_the_mutants_test() -> None:
    assert find_mutant.find() == []


# What is taken out of the sources, and where: each must be found by the orders of SEEDS.
MUTANTS = {
    "block barrier of a reduction": ("common/reduce.cuh", ["    __syncthreads();\n"]),
    "cluster barrier of a reduction": (
        "common/reduce.cuh",
        [
            "  if (warp == 0) {\n    cluster_arrive();\n  } else {\n"
            "    cluster_arrive_relaxed();\n  }\n  cluster_wait();\n"
        ],
    ),
    "wait of the cluster barrier": ("common/reduce.cuh", ["  cluster_wait();\n"]),
    "start of all blocks": (
        "kd_loss/kd_loss_kernel.cuh",
        ["  if (ranks > 1) cluster_arrive_relaxed();\n", "  if (ranks > 1) cluster_wait();\n"],
    ),
    "space of the second reduction": (
        "kd_loss/kd_loss_kernel.cuh",
        ["reinterpret_cast<char*>(stats_space.ranks + ranks)"],
    ),
    "wait for the copies": ("kd_loss/kd_loss_logits.cuh", ["copy_async_wait<0>();"]),
    "wait for the first copies": ("kd_loss/kd_loss_logits.cuh", ["copy_async_wait<3>();"]),
}
IN_PLACE_OF_IT = {"space of the second reduction": "dynamic_shared()"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_found(name: str, tmp_path: Path) -> None:
    """Compiles the kernels without one barrier; some order of threads must show it."""
    file, pieces = MUTANTS[name]
    sources = tmp_path / "csrc"
    shutil.copytree(backend.ROOT / "csrc", sources)
    text = (sources / file).read_text()
    for piece in pieces:
        assert text.count(piece) == 1, f"{name}: not found once: {piece!r}"
        text = text.replace(piece, IN_PLACE_OF_IT.get(name, ";"))
    (sources / file).write_text(text)
    library, reason = backend.build(sources, tmp_path / "build", (*backend.CHECKED, "-O1"))
    assert reason is None, reason
    done = subprocess.run(
        [sys.executable, find_mutant.__file__],
        env=os.environ | {"KDKERNELS_EMULATED": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
