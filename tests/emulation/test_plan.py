"""The launch plan of the CUDA kernel of ``kd_loss``: a pure function, checked without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from emulation.cases import LAYOUTS, device_for
from hypothesis import given
from hypothesis import strategies as st

from kdkernels import _native
from kdkernels.ops.kd_loss.spec import Divergence

host = _native.host()
pytestmark = pytest.mark.skipif(
    not hasattr(host, "kd_loss_plan"), reason="kdkernels._host was not built"
)

SHARED = {8: 166912, 9: 232448}  # bytes a block of an A100, an H100 may have
KL = Divergence.FORWARD_KL.value


def plan(classes: int, element_size: int = 2, divergence: int = KL, **more: Any) -> dict[str, Any]:
    more.setdefault("shared_per_block", SHARED[more.get("major", 9)])
    result: dict[str, Any] = host.kd_loss_plan(classes, element_size, divergence, **more)
    return result


@pytest.mark.parametrize(
    ("classes", "element_size", "cluster", "three_an_sm"),
    [
        (1000, 2, 1, True),
        (30522, 2, 2, True),
        (32000, 2, 2, True),
        (50257, 2, 4, True),
        (128256, 2, 8, True),
        (151936, 2, 8, True),
        (262144, 2, 8, False),
        (32000, 4, 4, True),
        (128256, 4, 8, False),
    ],
)
def test_hopper_keeps_the_rows_of_real_vocabularies(
    classes: int, element_size: int, cluster: int, three_an_sm: bool
) -> None:
    for aligned in (True, False):
        got = plan(classes, element_size, aligned=aligned)
        if (classes, aligned) != (151936, False):  # one vector too many for three
            third = (SHARED[9] + 1024) // 3 - 1024
            assert (got["shared_bytes"] <= third) == three_an_sm
        assert got["on_chip"] and got["cluster"] == cluster


def test_what_does_not_fit_is_walked_again() -> None:
    assert not plan(262144, 4)["on_chip"]
    assert not plan(1 << 22)["on_chip"]


def test_a_single_pass_keeps_nothing() -> None:
    assert not plan(32000, want_grad=False)["on_chip"]
    assert plan(32000, divergence=Divergence.JSD.value, want_grad=False)["on_chip"]


def test_no_clusters_before_hopper() -> None:
    got = plan(32000, major=8)
    assert got["on_chip"] and got["cluster"] == 1
    assert not plan(128256, major=8)["on_chip"]


def test_without_teacher_half_the_memory() -> None:
    assert plan(32000, divergence=Divergence.NONE.value)["cluster"] == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("models", [1, 2])
def test_emulation_can_force_each_layout(layout: str, models: int) -> None:
    divergence = KL if models == 2 else Divergence.NONE.value
    ranks = LAYOUTS[layout]
    gpu = device_for(ranks, 1090, 2, models)
    got = plan(
        1090,
        divergence=divergence,
        aligned=False,
        major=gpu["major"],
        shared_per_block=gpu["shared"],
    )
    assert (got["cluster"] if got["on_chip"] else 0) == ranks


@given(
    st.integers(1, 1 << 21),
    st.sampled_from([2, 4]),
    st.sampled_from([d.value for d in Divergence]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(SHARED)),
)
def test_every_plan_is_sound(
    classes: int, element_size: int, divergence: int, want_grad: bool, aligned: bool, major: int
) -> None:
    got = plan(classes, element_size, divergence, want_grad=want_grad, aligned=aligned, major=major)
    per_vector = 16 // element_size
    farthest = 0 if aligned else per_vector - 1
    assert got["vectors"] * per_vector >= classes + farthest
    assert got["vectors_a_rank"] * got["cluster"] >= got["vectors"]
    assert got["threads"] % 32 == 0 and 32 <= got["threads"] <= 384
    assert got["cluster"] in ((1,) if major < 9 or not got["on_chip"] else (1, 2, 4, 8))
    assert 0 < got["shared_bytes"] <= SHARED[major]
