"""How a run ends before its end: InputError, one sentence for bad input (file, line, field, what to do), and
signals."""

import argparse
import errno
import json
import os
import reprlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# How torch says it, on CUDA and on a CPU; looked for in words, so that this file needs no torch.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


class InputError(Exception):
    """The user's input cannot be used. The message is one sentence for a person; a traceback would add nothing."""


@contextmanager
def named(source: str | Path) -> Iterator[None]:
    """Put the place in front of an InputError from inside: helpers know the field, callers the file and line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def one_line(text: Path | str) -> str:
    """At most 90 printable characters of a path, whose end matters most, or of what another library says."""
    line = repr(str(text))[1:-1]
    return line if len(line) <= 90 else "..." + line[-87:]


_REPR = reprlib.Repr()  # bounded for values of any size and depth, where repr() takes long or hits the recursion limit
_REPR.maxlevel, _REPR.maxstring = 3, 80


def short(value: Any) -> str:
    """A value of the user's for a message: one line of at most 80 characters, with nothing but printable ones."""
    return _REPR.repr(value)[:80]


def cause_of(error: Exception) -> str:
    """What another library's exception says, on one line."""
    return one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__)


MAX_FILE = 2**27  # bytes of a file that is read whole; the largest that is meant to be is a tokenizer of some 12 MB


def read_text(path: Path | str, remedy: str = "", most: int = MAX_FILE) -> str:
    """The text of a file in UTF-8, a byte order mark left out. InputError, which names the file and ends with `remedy`,
    where it is missing, or no file (a pipe or a device would be read for ever), or has more than `most` bytes."""
    name, then = one_line(path), f"; {remedy}" if remedy else ""
    try:
        if not os.path.isfile(path):  # unlike Path.is_file, False also for names that no file can have
            raise InputError(f"{name}: {'is not a file' if os.path.lexists(path) else 'does not exist'}{then}")
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise InputError(f"{name}: has more than {most} bytes, so it is none of ours{then}")
        return content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise InputError(f"{name}: cannot be read ({cause_of(error)}){then}") from error


def parse_json(text: str, name: Path | str, remedy: str = "") -> Any:
    """What a JSON text says; `name`: the file (and line) that it stands in. InputError if it is none, or too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error).replace("line 1 ", "").partition(";")[0]  # behind ; Python advises on its limit of digits
        then = f"; {remedy}" if remedy else ""
        raise InputError(f"{one_line(name)}: is not valid JSON ({one_line(why)}){then}") from error


def read_json(path: Path | str, remedy: str = "", most: int = MAX_FILE) -> Any:
    """What a JSON file says, of any kind. InputError as read_text's and parse_json's."""
    return parse_json(read_text(path, remedy, most), path, remedy)


def read_object(path: Path | str, remedy: str = "", most: int = MAX_FILE) -> dict:
    """What a JSON file says that must hold an object. InputError as read_json's, and where it holds anything else."""
    value = read_json(path, remedy, most)
    if not isinstance(value, dict):
        raise InputError(f"{one_line(path)}: holds {short(value)} and no JSON object{f'; {remedy}' if remedy else ''}")
    return value


class Parser(argparse.ArgumentParser):
    """argparse, whose complaint is one sentence too, without the usage of sixty flags in front of it."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (python {self.prog} --help lists all flags)\n")


class Terminal:
    """A stream whose reader may leave (`| head`, a terminal that was closed): what is written then goes nowhere, and
    the run goes on, since its files have everything."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, work: Callable, *arguments):
        try:
            return work(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what is still in buffers, here and in C, goes there too
            os.close(nowhere)


# ------------------------------------------------------------------------------------------------------------ signals

# Ctrl-C, SIGTERM, SIGHUP (a closed terminal): the step under way is dropped, the rest saved; --resume goes on exactly.
# Long loops look at the flag, and leave early where it is set: micro-batches, every few decoded tokens, batches of an
# evaluation; what they return then is worth nothing. The flag is one process's own. So a loop only leaves early; that
# the step is dropped, by Stopped, is decided where all ranks meet anyway, and the flag travels there with what they
# tell each other. torchrun waits 30 seconds for its processes, then kills them: whatever cannot be left in time falls
# back on the checkpoint before.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ECHO = 1.0  # seconds in which another signal is the same request: a scheduler tells torchrun and its processes alike

asked_to_stop = False


class Stopped(Exception):
    """The step, or the evaluation, under way is dropped on all ranks. Nothing of it may be used."""


@contextmanager
def listening() -> Iterator[None]:
    """Inside, the first signal sets `asked_to_stop`; the next one ends the process at once, as it would outside."""
    global asked_to_stop
    first = None

    def note(number: int, _) -> None:
        global asked_to_stop
        nonlocal first
        first = first or time.monotonic()
        asked_to_stop = True
        if time.monotonic() - first > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    heard = SIGNALS if signal.getsignal(SIGNALS[-1]) != signal.SIG_IGN else SIGNALS[:-1]  # nohup: deaf to its terminal
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        asked_to_stop = False
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------------- how it ends


def end_in_words(kind: type[BaseException], error: BaseException, trace) -> None:
    """sys.excepthook from when this file is imported, so for the seconds in which torch is too."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    elif issubclass(kind, MemoryError):
        print("error: not enough memory to begin with", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end_in_words


def run(main: Callable[[], None], when_memory_ends: str = "ask for less at a time") -> None:
    """Run a script's main(). An InputError, a file that cannot be read or written (a full disk), or the end of the
    memory ends it with one sentence on stderr, exit code 2; `when_memory_ends` names the flags that help. Ctrl-C ends
    it with code 130, where the script does not listen for it itself (listening)."""
    sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except InputError as error:
        sentence = str(error)
    except OSError as error:
        remedy = "free the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        place = "a file of the run" if error.filename is None else one_line(error.filename)
        sentence = f"{place}: {error.strerror or error}; {remedy} or name another place"
    except (MemoryError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        if not isinstance(error, MemoryError) and not any(words in first_line.lower() for words in NO_MEMORY):
            raise
        sentence = f"not enough memory ({first_line:.120}): {when_memory_ends}"
    else:
        return
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
