"""LayerMap and Projections: index conventions, refusals, what is trained and what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdkernels import LayerMap, Projections


def entries(count: int, width: int = 4) -> list[Tensor]:
    """A list whose entry i is filled with i."""
    return [torch.full((2, 3, width), float(i)) for i in range(count)]


def numbers(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    return [(int(s.flatten()[0]), int(t.flatten()[0])) for s, t in pairs]


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),  # TinyBERT's 3 m
        ("uniform", 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        ("uniform", 4, 6, [(1, 2), (2, 3), (3, 5), (4, 6)]),  # halves go up: 1.5, 3, 4.5, 6
        ("uniform", 5, 12, [(1, 2), (2, 5), (3, 7), (4, 10), (5, 12)]),
        ("uniform", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ("last", 3, 12, [(1, 10), (2, 11), (3, 12)]),
        ("first", 3, 12, [(1, 1), (2, 2), (3, 3)]),
        ([(0, 0), (2, 5), (2, 6)], 2, 6, [(0, 0), (2, 5), (2, 6)]),
    ],
)
def test_rules(rule: Any, student: int, teacher: int, expected: list[tuple[int, int]]) -> None:
    layers = LayerMap(rule)
    assert layers.pairs(student, teacher) == expected
    assert numbers(layers.hidden(entries(student + 1), entries(teacher + 1))) == expected
    # Entry i of the attentions belongs to layer i + 1.
    found = numbers(layers.attentions(entries(student), entries(teacher)))
    assert found == [(s - 1, t - 1) for s, t in expected if s]
    if isinstance(rule, str):
        with_embedding = LayerMap(rule, include_embedding=True)
        assert with_embedding.pairs(student, teacher) == [(0, 0), *expected]
        assert numbers(with_embedding.attentions(entries(student), entries(teacher))) == found


@pytest.mark.parametrize("teacher", range(1, 30))
def test_uniform_is_even_and_ends_at_the_last_layer(teacher: int) -> None:
    for student in range(1, teacher + 1):
        chosen = [t for _, t in LayerMap("uniform").pairs(student, teacher)]
        steps = {b - a for a, b in zip([0, *chosen], chosen, strict=False)}
        assert chosen[-1] == teacher and min(steps) >= 1 and max(steps) - min(steps) <= 1


def test_tuples_are_lists_too() -> None:
    pairs = LayerMap("last").hidden(tuple(entries(3)), tuple(entries(5)))
    assert numbers(pairs) == [(1, 3), (2, 4)]


def test_equality_and_repr() -> None:
    layers = LayerMap([[1, 2], [2, 4]])  # as read from a file
    assert layers == LayerMap(((1, 2), (2, 4))) != LayerMap([(1, 2)])
    assert LayerMap("last") == LayerMap("last") != LayerMap("last", include_embedding=True)
    assert len({LayerMap("last"), LayerMap("last"), layers}) == 2
    assert eval(repr(layers)) == layers and "rule=((1, 2), (2, 4))" in repr(layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "skip"}, "rule must be one of uniform, last, first or pairs of layers, got 's"),
        ({"rule": 3}, "rule must be a name or pairs, got int"),
        ({"rule": []}, "rule must hold at least one pair, got none"),
        ({"rule": [1, 2]}, r"rule must hold pairs .*, got \(1,\)"),
        ({"rule": [(1, 2, 3)]}, r"rule must hold pairs .*, got \(1, 2, 3\)"),
        ({"rule": [(1, -1)]}, r"integers of at least 0, got \(1, -1\)"),
        ({"rule": [(1, 2.0)]}, r"integers of at least 0, got \(1, 2.0\)"),
        ({"rule": [(1, 2), (1, 2)]}, r"rule must hold different pairs, got \(1, 2\) twice"),
        ({"rule": [(1, 2)], "include_embedding": True}, r"must be False with pairs, which may"),
        ({"rule": "last", "include_embedding": 1}, "include_embedding must be a bool, got int"),
        ({"rule": "last", "student_layers": 0}, "student_layers must be an integer .*, got 0"),
        ({"rule": "last", "teacher_layers": 2.0}, "teacher_layers must be .*, got 2.0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^LayerMap: .*{message}"):
        LayerMap(**options)


@pytest.mark.parametrize(
    ("layers", "args", "message"),
    [
        (LayerMap("uniform"), (4, 3), "student_layers must be at most the 3 .*'uniform', got 4"),
        (LayerMap("last"), (True, 3), "student_layers must be an integer of at least 1, got True"),
        (LayerMap("last"), (1, 0), "teacher_layers must be an integer of at least 1, got 0"),
        (LayerMap("last", student_layers=3), (4, 6), "student_layers must be 3, got 4"),
        (LayerMap(((5, 1),)), (4, 6), "student layer must be at most 4, counting from 1 .*, got 5"),
        (LayerMap(((4, 7),)), (4, 6), "teacher layer must be at most 6, counting from 1 .*, got 7"),
    ],
)
def test_refusals_of_pairs(layers: LayerMap, args: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^LayerMap: {message}"):
        layers.pairs(*args)


HIDDEN = "hidden-state lists hold the embedding output and then one entry a layer"
ATTENTIONS = "attention lists hold one entry a layer and none for the embedding"
SIZED = LayerMap("uniform", student_layers=4, teacher_layers=12)


@pytest.mark.parametrize(
    ("layers", "method", "sizes", "message"),
    [
        # One too few or too many is noticed where the numbers of layers are known ...
        (SIZED, "hidden", (4, 13), f"student must have 5 entries for 4 layers, got 4; {HIDDEN}"),
        (SIZED, "hidden", (5, 12), f"teacher must have 13 entries .*, got 12; {HIDDEN}"),
        (SIZED, "attentions", (5, 12), f"student must have 4 entries .*, got 5; {ATTENTIONS}"),
        (SIZED, "attentions", (4, 13), f"teacher must have 12 entries .*, got 13; {ATTENTIONS}"),
        # ... or where a layer is out of range; the message states the convention.
        (LayerMap(((4, 12),)), "hidden", (5, 12), f"teacher layer .* 11, .*, got 12; {HIDDEN}"),
        (LayerMap(((5, 1),)), "attentions", (4, 12), f"student layer .* 4.* got 5; {ATTENTIONS}"),
        (LayerMap("first"), "hidden", (6, 5), f"at most the 4 of the teacher.*; {HIDDEN}"),
        (LayerMap("last"), "hidden", (1, 13), f"student must have an entry .*, got 1; {HIDDEN}"),
        (LayerMap("last"), "attentions", (0, 3), f"an entry for each .*, got 0; {ATTENTIONS}"),
        (LayerMap(((0, 0),)), "attentions", (4, 12), f"must pair layers, got .*; {ATTENTIONS}"),
    ],
)
def test_refusals_of_lists(
    layers: LayerMap, method: str, sizes: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(layers, method)(entries(sizes[0]), entries(sizes[1]))


def test_refusals_of_entries() -> None:
    with pytest.raises(TypeError, match="attentions: teacher must hold .* NoneType at 0 .*'eager'"):
        LayerMap("last").attentions(entries(2), (None, None))
    with pytest.raises(TypeError, match="hidden: student must hold tensors, got str at 1$"):
        LayerMap("last").hidden([*entries(1), "x"], entries(3))
    with pytest.raises(TypeError, match="hidden: student must be a list of tensors, got Tensor"):
        LayerMap("last").hidden(torch.zeros(3, 2), entries(3))


def test_projections() -> None:
    projections = Projections([3, 4, 8], [8, 8, 8], bias=False)
    assert len(projections) == len(list(projections)) == 3
    for width, linear in zip((3, 4, 8), projections, strict=True):
        assert linear is not None and linear.bias is None
        assert linear(torch.randn(2, 5, width)).shape == (2, 5, 8)
    assert projections[-1] is projections[2]
    with pytest.raises(IndexError, match="Projections: index must be below 3, got 3"):
        projections[3]
    assert Projections([4], [8], dtype=torch.float64)[0].weight.dtype == torch.float64


def test_equal_widths_are_skipped_on_request() -> None:
    assert all(linear is not None for linear in Projections([4, 8], [8, 8]))
    projections = Projections([4, 8], [8, 8], skip_equal=True)
    assert projections[0] is not None and projections[1] is None
    assert list(projections.state_dict()) == ["linears.0.weight", "linears.0.bias"]
    assert "None" in repr(projections.to(torch.float64))
    assert list(Projections([8, 8], [8, 8], share=True, skip_equal=True)) == [None, None]


def test_a_shared_projection_is_one() -> None:
    projections = Projections([4, 4, 4], [8, 8, 8], share=True)
    assert len(projections) == 3 and len({id(linear) for linear in projections}) == 1
    assert len(list(projections.parameters())) == len(projections.state_dict()) == 2
    # It learns from every pair.
    x = torch.randn(5, 4)
    sum(linear(x).sum() for linear in projections).backward()
    torch.testing.assert_close(projections[0].weight.grad, 3 * x.sum(0).expand(8, 4))


def test_projections_for_pairs() -> None:
    pairs = LayerMap("last").hidden(entries(3, width=4), entries(5, width=6))
    projections = Projections.for_pairs(pairs, share=True, bias=False)
    assert [linear.weight.shape for linear in projections] == [(6, 4)] * 2
    assert Projections.for_pairs([(s.to("meta"), t) for s, t in pairs])[0].weight.is_meta


def test_projections_are_not_of_the_student() -> None:
    student, teacher = nn.Linear(3, 4), nn.Linear(3, 6)
    names = list(student.state_dict())
    projections = Projections([4], [6])
    optimizer = torch.optim.SGD([*student.parameters(), *projections.parameters()], lr=0.1)
    before = [p.clone() for p in (*student.parameters(), *projections.parameters())]
    x = torch.randn(5, 3)
    (projections[0](student(x)) - teacher(x).detach()).square().mean().backward()
    optimizer.step()
    after = [*student.parameters(), *projections.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert list(student.state_dict()) == names
    other = Projections([4], [6])
    other.load_state_dict(projections.state_dict())
    assert torch.equal(other[0](student(x)), projections[0](student(x)))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (([4], [8, 8]), {}, r"teacher_widths must be as many as student_widths \(1\), got 2"),
        (([], []), {}, "student_widths must name at least one pair, got none"),
        (([0], [8]), {}, "student_widths must be an integer of at least 1, got 0"),
        (([4], [8.0]), {}, "teacher_widths must be an integer of at least 1, got 8.0"),
        ((4, 8), {}, "student_widths must be a list of integers, got int"),
        (([4, 6], [8, 8]), {"share": True}, r"student_widths must agree .*, got \[4, 6\]"),
        (([4, 4], [8, 6]), {"share": True}, r"teacher_widths must agree .*, got \[8, 6\]"),
    ],
)
def test_projection_refusals(args: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^Projections: {message}"):
        Projections(*args, **options)


def test_refusals_for_pairs() -> None:
    with pytest.raises(TypeError, match="Projections: pairs must hold two tensors, got .* at 1"):
        Projections.for_pairs([(torch.zeros(2), torch.zeros(2)), (torch.zeros(2), None)])
    with pytest.raises(ValueError, match="at least one pair, got none"):
        Projections.for_pairs([])
