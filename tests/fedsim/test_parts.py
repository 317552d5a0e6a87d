"""Rows in parts are those of the whole, whoever asks and in whatever order parts came."""

from __future__ import annotations

import torch

from fedsim.parts import Parts


def test_parts_of_parts_stand_where_their_jobs_do() -> None:
    inner = Parts(3)
    inner.add(torch.tensor([1]), {"v": torch.tensor([[1.0, 1.0]])})
    inner.add(torch.tensor([2, 0]), {"v": torch.tensor([[2.0, 2.0], [0.0, 0.0]])})
    outer = Parts(4)
    outer.add(torch.tensor([3]), {"v": torch.tensor([[9.0, 9.0]])})
    outer.add(torch.tensor([2, 0, 1]), inner)
    assert outer["v"][:, 0].tolist() == [1.0, 2.0, 0.0, 9.0]
    rows = [piece["v"][row, 0].item() for piece, row in (place for place in outer.places() if place)]
    assert rows == [1.0, 2.0, 0.0, 9.0]
    assert list(outer) == ["v"] and len(outer) == 1


def test_a_name_that_some_stacks_did_not_give_is_zero_there() -> None:
    parts = Parts(3)
    parts.add(torch.tensor([2]), {"loss": torch.tensor([5.0]), "skipped": torch.tensor([1.0])})
    parts.add(torch.tensor([0, 1]), {"loss": torch.tensor([3.0, 4.0])})
    assert parts["loss"].tolist() == [3.0, 4.0, 5.0]
    assert parts["skipped"].tolist() == [0.0, 0.0, 1.0]


def test_one_part_in_order_is_the_whole_itself() -> None:
    rows = torch.rand(4, 3)
    assert Parts.of({"v": rows}, 4)["v"] is rows


def test_rows_of_several_calls_are_gathered_by_stack_and_only_where_they_were_given() -> None:
    first, second = Parts(3), Parts(2)
    first.add(torch.tensor([2, 0]), {"v": torch.tensor([[2.0], [0.0]])})
    second.add(torch.tensor([0, 1]), {"v": torch.tensor([[5.0], [6.0]]), "w": torch.tensor([[7.0], [8.0]])})
    (a, nothing, b), (c, d) = first.places(), second.places()
    assert nothing is None
    picked = Parts.gathered([d, a, None, b, c])
    assert [index.tolist() for index, _ in picked.pieces] == [[0, 4], [1, 3]]
    assert picked["v"].tolist() == [[6.0], [0.0], [0.0], [2.0], [5.0]]
    assert picked["w"].tolist() == [[8.0], [0.0], [0.0], [0.0], [7.0]]
    assert Parts.gathered([c, d])["v"] is second["v"]  # a whole stack is not copied
    assert Parts.gathered([d])["v"].untyped_storage().nbytes() == 4  # and a row does not keep its stack alive


def test_no_part_has_no_names() -> None:
    assert dict(Parts(5)) == {} and "v" not in Parts(5)
