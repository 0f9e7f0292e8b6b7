"""How a signal stops training."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class _CutShort(Exception):
    """A signal arrived where work may be cut short."""


class Signals:
    """SIGINT, SIGTERM and SIGHUP in a `with` block: the first is noted, for the loop to stop; a second stops at once.

    SIGHUP stays ignored where it is ignored on entry, as under nohup.

    number: the signal that arrived, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._cutting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        if self._cutting:
            raise _CutShort

    @contextlib.contextmanager
    def cutting_short(self) -> Iterator[None]:
        """Leave the block when a signal arrives, as its work may take minutes and is not needed."""
        self._cutting = True
        try:
            yield
        except _CutShort:
            pass
        finally:
            self._cutting = False
