"""SIGTERM during a run: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class _Noted:
    """A handler that does nothing but remember."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.asked.set()


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Inside this context SIGTERM does not kill; the function that is handed out says whether it has come.

    Contexts inside one another share what they know: a signal that came when an inner one was about to end is not lost
    on the outer one. Outside the main thread, where Python allows no handlers of one's own, it never says so.
    """
    before = signal.getsignal(signal.SIGTERM)
    if isinstance(before, _Noted):
        yield before.asked.is_set
        return
    noted = _Noted()
    if threading.current_thread() is not threading.main_thread():
        yield noted.asked.is_set
        return
    signal.signal(signal.SIGTERM, noted)
    try:
        yield noted.asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
