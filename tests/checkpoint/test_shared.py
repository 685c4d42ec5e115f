"""How the optimizer's state is shared out: every name once, in order, about as many bytes each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smedjan.checkpoint.shared import shares


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 9))
def test_every_name_once_and_in_order(sizes, world):
    named = {f"t{index}": size for index, size in enumerate(sizes)}
    made = shares(named, world)
    assert len(made) == world
    assert [name for share in made for name in share] == list(named)
    # A name goes where its middle lies: a share is off by half a tensor at either end
    most = sum(sizes) / world + max(sizes, default=0)
    assert all(sum(named[name] for name in share) <= most for share in made)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_equal_tensors_are_dealt_out_evenly(world):
    assert [len(share) for share in shares(dict.fromkeys(map(str, range(4 * world)), 8), world)] == [4] * world
