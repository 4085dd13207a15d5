"""Importing costs less, and leaves the process as it was."""

import gc
import sys
from importlib import import_module

import pytest

from infra.quick_imports import hidden, without_collecting


def test_nothing_is_collected_inside_and_again_afterwards() -> None:
    with without_collecting():
        with without_collecting():
            pass
        assert not gc.isenabled(), "the inner block must not end the outer one"
    assert gc.isenabled()


def test_a_hidden_package_cannot_be_imported_until_the_block_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with hidden(["colorsys"]), pytest.raises(ImportError):
        import_module("colorsys")
    assert import_module("colorsys").rgb_to_hsv(0, 0, 1)[2] == 1


def test_a_package_that_is_there_already_is_not_hidden() -> None:
    with hidden(["gc", "no_such_package"]), hidden(["no_such_package"]):
        assert sys.modules["gc"] is gc
    assert sys.modules["gc"] is gc
    assert "no_such_package" not in sys.modules
