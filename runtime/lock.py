"""One run a folder: a lock that the system lets go of when its process ends, however that came about (kill -9 too).

    with lock.held(out):      InputError, which names the holder, where another run holds it

Of a job of several processes rank 0 holds it for all. It is flock(2) on OUT/.lock: local disks and NFS know it (there
also between machines); a file system that has no locks is told, and the run goes on without one.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from errors import InputError, cause_of, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Make the folder, if it is not there, and hold its lock. What is empty at the end and was made here goes again: a
    run that is refused leaves nothing behind."""
    path, made = out / NAME, [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = locked(path)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({cause_of(error)}); name another folder") from None
    try:
        yield
    finally:
        if is_at(file, path):
            path.unlink()  # while it is held: whoever waits finds out in locked()
        file.close()
        with suppress(OSError):  # it is not empty
            for folder in made:
                folder.rmdir()


def locked(path: Path) -> TextIO:
    """The open and locked file."""
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter on some network file systems
            file.seek(0)
            holder = one_line(file.read(200).strip()) or "it does not say which"
            file.close()
            raise InputError(
                f"--out {path.parent}: another run writes to it ({holder}); wait for it, end it, or name another folder"
            ) from None
        except OSError as error:
            tqdm.write(f"{path.parent}: no locks here ({cause_of(error)}), so see to it that no other run writes to it")
            return file
        if is_at(file, path):
            file.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
            return file
        file.close()  # the one who held it ended meanwhile, and took the file away


def is_at(file: TextIO, path: Path) -> bool:
    """Is the open file the one that has this name now?"""
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False
