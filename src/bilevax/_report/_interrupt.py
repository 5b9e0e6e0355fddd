"""Ctrl-C, remembered until somebody asks."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Ctrl-C as a request: the first is remembered, the second interrupts."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, error, traceback
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
