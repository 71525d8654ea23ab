"""What the emulation must report: kernels with one bug each, named with kernel, block and thread.

And what it must not: sound kernels that use every part of it.
"""

from __future__ import annotations

import ctypes
import re

import pytest
from emulation import backend

PATH, REASON = backend.build_planted()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

VALUES = [float(i) for i in range(128)]
SEEDS = range(12)  # every order of threads with every time of copies

# Kernel -> what is reported, and where.
BUGS = {
    "barrier_in_a_branch": r"thread \(\d+, 0, 0\): deadlock at planted_bugs.cu:\d+: "
    r"16 threads wait at __syncthreads, 48 have ended",
    "barriers_in_both_branches": "a divergent barrier: this thread is at planted_bugs.cu:",
    "barrier_after_an_early_return": "63 threads wait at __syncthreads, 1 have ended",
    "shuffle_from_an_absent_lane": "reads from lane 1[6-9]|reads from lane 2[0-3]",
    "shuffle_in_a_branch": r"reads from lane 5, which takes no part|deadlock",
    "mask_without_the_caller": r"thread \((1[6-9]|[2-6]\d), 0, 0\): a warp operation at "
    r"planted_bugs.cu:\d+ whose mask leaves out the caller",
    "different_warp_operations": "lanes of one warp meet at different operations",
    "unwritten_shared": r"thread \(23, 0, 0\): a read of 4 bytes of shared memory that was never "
    r"written: from byte 160",
    "write_behind_shared": r"thread \(63, 0, 0\): a write of 4 bytes outside of shared memory: "
    r"from byte 256, the block has 256",
    "read_behind_global": r"block \(1, 0, 0\), thread \(63, 0, 0\): a read of 4 bytes outside of "
    r"every tensor of the call: 0 bytes behind one",
    "write_before_global": r"block \(0, 0, 0\), thread \(0, 0, 0\): a write of 4 bytes outside of "
    r"every tensor of the call: 4 bytes before one",
    "misaligned_vector": "a read of 16 bytes at an address that is not aligned to them",
    "copy_without_a_wait": r"thread \(7, 0, 0\): a thread ended without waiting for its",
    "cluster_barrier_of_one_block": "63 threads wait at __syncthreads, 64 threads wait at the "
    "cluster barrier, 1 have ended",
    "write_to_an_input": "a write of 4 bytes to an input",
}
# Found by some seeds only: a copy, or a block, may have been early enough by chance.
BY_CHANCE = {
    "read_before_the_copy": r"thread \(3, 0, 0\): a read of 4 bytes of shared memory that was "
    "never written: from byte 48",
    "store_to_an_ended_block": r"block \(0, 0, 0\), thread \(0, 0, 0\): a store to a block that "
    "has (not started|ended)",
}
SOUND = {
    "sum_in_static_shared": [float(sum(range(64)))] * 64 + [float(sum(range(64, 128)))] * 64,
    "votes_and_shuffles": VALUES,
    "atomics": VALUES,
    "three_dimensions": VALUES,
    "exchange_in_a_cluster": [*VALUES[64:], *VALUES[:64]],
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(PATH))
    found.planted.restype = ctypes.c_char_p
    found.planted.argtypes = (ctypes.c_char_p, ctypes.POINTER(ctypes.c_float))
    found.emulated_device.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_uint64)
    return found


def run(library: ctypes.CDLL, kernel: str, seed: int) -> tuple[str, list[float]]:
    """The error that the kernel ended with, and what it computed."""
    library.emulated_device(9, 232448, seed)
    values = (ctypes.c_float * 128)(*VALUES)
    message: bytes = library.planted(kernel.encode(), values)
    return message.decode(), list(values)


@pytest.mark.parametrize("kernel", BUGS)
def test_bug_is_reported(library: ctypes.CDLL, kernel: str) -> None:
    for seed in SEEDS:
        message, _ = run(library, kernel, seed)
        place = rf"^{kernel}, block \(\d+, 0, 0\), thread \(\d+, 0, 0\): "
        assert re.search(place, message), message
        assert re.search(BUGS[kernel], message), message


@pytest.mark.parametrize("kernel", BY_CHANCE)
def test_bug_is_reported_by_some_seed(library: ctypes.CDLL, kernel: str) -> None:
    messages = [run(library, kernel, seed)[0] for seed in SEEDS]
    assert all(re.search(BY_CHANCE[kernel], message) for message in messages if message)
    assert sum(bool(message) for message in messages) >= 4
    assert "" in messages


def test_missing_barrier_changes_the_result(library: ctypes.CDLL) -> None:
    results = [run(library, "missing_barrier", seed) for seed in SEEDS]
    assert all(message == "" for message, _ in results)
    assert len({tuple(values) for _, values in results}) > 1


@pytest.mark.parametrize("kernel", SOUND)
def test_sound_kernel_passes(library: ctypes.CDLL, kernel: str) -> None:
    for seed in SEEDS:
        assert run(library, kernel, seed) == ("", SOUND[kernel])
