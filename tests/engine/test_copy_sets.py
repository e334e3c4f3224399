"""Which copies belong together, and who sends which to whom."""

import pytest

from megascratch.engine.copy_sets import CopySet, complete_sets, heard, partners, require_partners, said, transfers
from megascratch.errors import LayoutError

NODES = [(0, 1), (2, 3), (4, 5)]
A, B, OTHER = CopySet(40, "first"), CopySet(50, "first"), CopySet(50, "second")


def test_each_rank_has_a_partner_on_both_neighbours() -> None:
    assert [partners(NODES, rank) for rank in range(6)] == [(2, 4), (3, 5), (4, 0), (5, 1), (0, 2), (1, 3)]


def test_only_sets_of_one_launch_with_every_rank_are_complete() -> None:
    """Step 50 is whole only in two launches' halves; a node may hold copies of ranks that are elsewhere now."""
    held = [{0: [A, B], 1: [A, OTHER]}, {0: [A, B], 1: [A, OTHER]}]
    assert complete_sets(held) == [A]
    assert complete_sets([{0: [A, B], 1: [A, B], 7: [B]}, {}]) == [B, A]
    assert complete_sets([{0: [A]}, {}]) == []


def test_copies_go_to_those_whose_node_lacks_them() -> None:
    """The second of three nodes is empty; its copies are on the third."""
    first = {0: [A], 1: [A], 4: [A], 5: [A]}
    third = {4: [A], 5: [A], 2: [A], 3: [A]}
    held = [first, first, {}, {}, third, third]
    assert list(transfers(A, held)) == [(4, 2), (5, 3)]
    assert list(transfers(A, [{0: [A], 1: [A]}, {0: [A], 1: [A]}])) == []


def test_what_is_said_is_heard() -> None:
    holdings = {0: [A, B], 3: []}
    assert heard(said(holdings)) == holdings


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([(0, 1)], "needs another node: all 2 ranks see"),
        ([(0, 1), (2,)], "as many ranks on every node: they have 1 or 2"),
    ],
)
def test_nodes_without_a_partner_are_refused(nodes: list[tuple[int, ...]], message: str) -> None:
    require_partners(NODES)
    with pytest.raises(LayoutError, match=message):
        require_partners(nodes)
