"""The garbage collector is off while programs are made, and is on again behind, whatever happened."""

from __future__ import annotations

import gc

import pytest

from smedjan.graph.no_gc import no_gc


def test_it_is_off_within_and_on_behind():
    assert gc.isenabled()
    with no_gc():
        assert not gc.isenabled()
        with no_gc():
            pass
        assert not gc.isenabled(), "an inner one leaves it to the outer one"
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), no_gc():
        _ = 1 / 0
    assert gc.isenabled()


def test_one_who_has_switched_it_off_finds_it_off():
    gc.disable()
    try:
        with no_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
