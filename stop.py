"""Ctrl-C, SIGTERM, SIGHUP (a closed terminal): the step under way is dropped, the rest saved; --resume goes on exactly.

    with stop.listening():
        for ...:              long loops look at the flag, and leave early where it is set:
            if stop.asked:    micro-batches, every few decoded tokens, batches of an evaluation
                break         what they return then is worth nothing

The flag is one process's own. So a loop only leaves early; that the step is dropped, by Stopped, is decided where all
ranks meet anyway, and the flag travels there with what they tell each other (train_grpo.py). torchrun waits 30 seconds
for its processes, then kills them: whatever cannot be left in time falls back on the checkpoint before.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ECHO = 1.0  # seconds in which another signal is the same request: a scheduler tells torchrun and its processes alike

asked = False


class Stopped(Exception):
    """The step, or the evaluation, under way is dropped on all ranks. Nothing of it may be used."""


@contextmanager
def listening() -> Iterator[None]:
    """Inside, the first signal sets `asked`; the next one ends the process at once, as it would outside."""
    global asked
    first = None

    def note(number: int, _) -> None:
        global asked
        nonlocal first
        first = first or time.monotonic()
        asked = True
        if time.monotonic() - first > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    heard = SIGNALS if signal.getsignal(SIGNALS[-1]) != signal.SIG_IGN else SIGNALS[:-1]  # nohup: deaf to its terminal
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        asked = False
        for number, handler in before.items():
            signal.signal(number, handler)
