"""Runs a library of changed kernels over layouts and orders of threads: success is a difference.

Called by ``test_emulation.py`` in a process of its own, because a process registers the operators
of one library only.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402
from emulation import backend  # noqa: E402
from emulation.cases import LAYOUTS, SEEDS, Expected, device_for, make  # noqa: E402

from kdkernels.ops.kd_loss.op import kd_loss_grad  # noqa: E402
from kdkernels.ops.kd_loss.spec import Divergence, Spec  # noqa: E402


def find() -> list[str]:
    """The cases that fail, as text."""
    torch.manual_seed(0)
    found = []
    student = make(2, 2048, torch.float32)
    teacher = make(2, 2048, torch.float32)
    spec = Spec(divergence=Divergence.JSD.value, kd_weight=1.0)
    expected = Expected(student, teacher, None, None, None, spec)
    for layout, ranks in LAYOUTS.items():
        for seed in SEEDS:
            gpu = device_for(ranks, 2048, 4)
            try:
                with backend.device(**gpu, seed=seed):
                    got = kd_loss_grad("emulated", student, teacher, None, None, None, spec)
                expected.check(got[0], grad=got[2])
            except (AssertionError, RuntimeError) as error:
                found.append(f"{layout}, seed {seed}: {str(error).splitlines()[0]}")
    return found


if __name__ == "__main__":
    reason = backend.load()
    if reason is not None:
        sys.exit(reason)
    found = find()
    print("\n".join(found))
    sys.exit(0 if found else 1)
