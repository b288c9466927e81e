"""Progress: on a terminal, what takes its time and for how long, on a line that goes away."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

_EVERY = 0.5


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on stderr that ``what`` is at work, if it is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    done, start = threading.Event(), time.perf_counter()

    def tell() -> None:
        while not done.wait(_EVERY):
            sys.stderr.write(f"\rmfx: {what}, {time.perf_counter() - start:.0f} s\x1b[K")
            sys.stderr.flush()

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
