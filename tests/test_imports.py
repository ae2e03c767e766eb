"""The collector rests while large libraries are imported."""

from __future__ import annotations

import gc

import pytest

from gvpo_ray.imports import large_imports


def test_the_collector_is_off_inside_and_afterwards_as_it_was() -> None:
    for was_on in (True, False):
        gc.unfreeze()
        (gc.enable if was_on else gc.disable)()
        try:
            with large_imports():
                assert not gc.isenabled()
            assert gc.isenabled() == was_on and gc.get_freeze_count() > 0
        finally:
            gc.unfreeze()
            gc.enable()


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), large_imports():
        raise ImportError
    assert gc.isenabled()
