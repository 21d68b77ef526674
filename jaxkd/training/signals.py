"""How a run is asked to stop, and how it says that it did."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Stopped(Exception):
    """SIGTERM or SIGINT came and the state is saved; run again to continue."""


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a flag that the loop reads.

    A second signal ends the process at once, by the handlers that were there before. A
    signal that the process was started to ignore, as shells do with the SIGINT of their
    background processes, stays ignored.
    """

    def __init__(self):
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
