"""Large libraries are imported without looking for garbage meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Switch the garbage collector off for the imports inside, and let it pass over what they leave for good.

    vLLM's modules are imported in a fifth less time so (11.1 in place of 13.7 CPU seconds), transformers' and
    DeepSpeed's in a quarter less, since the collector walks over all of their objects again and again.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()
