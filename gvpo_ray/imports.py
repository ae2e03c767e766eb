"""Large libraries are imported without looking for garbage meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Switch the garbage collector off for the imports inside, and let it pass over what they leave for good.

    vLLM's modules are imported in a fifth less time so (11.1 in place of 13.7 CPU seconds), the learner's
    with transformers in a quarter less (8.6 in place of 11.2), since the collector walks over all of their
    objects again and again. vLLM's core, a process of vLLM's own, gains nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()
