"""Being asked to stop: SIGTERM and SIGUSR1 set a flag, and work stops where it can go on from.

This module is imported before all others, so it imports nothing that takes time. A handler does no more than set the flag
and pass the signal on: saving inside of one may meet a collective half-way and hang.
"""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STATUS = {signal.SIGUSR1: 3, signal.SIGTERM: 143}  # that the process ends with: requeue it; or 128 + 15, as shells have it

_asked: signal.Signals | None = None
_children: set[int] = set()


class Stopped(BaseException):
    """Work stopped at a safe point because a signal asked for it. No error, so nothing that handles errors catches it."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by.name)
        self.by = by

    @property
    def status(self) -> int:
        return STATUS[self.by]

    def __str__(self) -> str:
        return f"Stopped by {self.by.name}. The same command goes on from here."


def listen() -> None:
    """From here on SIGTERM and SIGUSR1 only ask."""
    for number in STATUS:
        signal.signal(number, _ask)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = signal.Signals(number)  # the last one counts: SIGTERM after SIGUSR1 says that there is no requeue
    pass_on(_children, _asked)


def asked() -> signal.Signals | None:
    """The signal that asked this process to stop, if one did."""
    return _asked


def stop_if_asked() -> None:
    """A safe point: all that was worked out is on disk.

    Raises:
        Stopped: this process was asked to stop.
    """
    if _asked is not None:
        raise Stopped(_asked)


def by_status(status: int) -> signal.Signals | None:
    """The signal that stopped a process with this exit status, in good order or before it could listen."""
    for number, ordered in STATUS.items():
        if status in (ordered, -number):
            return number
    return None


def pass_on(processes: Iterable[int], number: int) -> None:
    """Send a signal to those of the processes that are still there."""
    for process in tuple(processes):
        with suppress(ProcessLookupError):
            os.kill(process, number)


@contextmanager
def passing_on_to(process: int) -> Iterator[None]:
    """While this lasts, what asks this process to stop asks that one too, also what asked before."""
    _children.add(process)
    try:
        if _asked is not None:
            pass_on({process}, _asked)
        yield
    finally:
        _children.discard(process)


@contextmanager
def together() -> Iterator[None]:
    """What ends this work early asks the processes that it passes signals on to as well: they would be waited for to their end.

    It may be Ctrl-C, which a terminal sends to all and `kill -INT` to one, or one of them that was stopped by itself.
    """
    try:
        yield
    except BaseException as error:
        if _asked is None:
            _ask(error.by if isinstance(error, Stopped) else signal.SIGTERM, None)
        raise
