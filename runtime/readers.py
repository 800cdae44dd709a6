"""Pictures, decoded, resized and cut into patches ahead of the step, and handed out in the order asked for.

    with Readers(workers) as readers:
        for index, view in readers.read(indices, samples, image_config, ahead):
            prompt = processor.prompt(samples[index], view)

What comes out, errors included, does not depend on the number of workers; with 0 each picture is read in this process
when its turn comes. There is no state to save: what was read ahead when a run ended, the next one reads again.

Workers are programs of their own, serve(), each with a thread here that hands it a sample and waits for the picture.
A DataLoader's or a ProcessPoolExecutor's would be forks of this process, which may hang once torch has threads and CUDA
a context, or would import the main script anew: 3 s and 400 MB each, where these take 0.1 s and 40 MB. An executor's
outlive a main process that is killed; these end with their socket, however it came to be closed.

A worker decodes and resizes, and sends bytes (h, w, 3). The thread normalises and cuts them, in numpy, which lets the
step go on meanwhile: patches are fp32 and eight times as large, and 23 MB of them (1,225 tokens) took 80 ms through a
pipe, where making them takes 10.

Left out: pictures of evaluations, which are read when they are needed.
"""

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from signal import SIG_DFL, SIG_IGN, SIGINT, SIGPIPE, SIGTERM, signal

from errors import InputError
from images import ImageConfig, Picture, Sample, View, read_picture

ROOT = str(Path(__file__).resolve().parent.parent)
WORKER = "from runtime.readers import serve; serve()"


class Readers:
    """`workers` processes that read pictures. They start when they are first needed and end with the `with` block."""

    def __init__(self, workers: int):
        self.workers = workers
        self.threads = ThreadPoolExecutor(max(workers, 1))  # starts none before its first task
        self.mine = threading.local()  # of each thread: its process and the connection to it
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.kill()  # it holds nothing that would have to be written
        self.threads.shutdown()
        for process in self.processes:
            process.kill()  # one that was only being started
            process.wait()

    def read(
        self, indices: Iterable[int], samples: Sequence[Sample], config: ImageConfig, ahead: int
    ) -> Iterator[tuple[int, View | InputError]]:
        """(index, view of samples[index]) for each index, in order; the InputError instead of what cannot be read.

        Up to `ahead` further ones are being made or lie here waiting: 19 MB each at 1,000 tokens. An InputError is
        raised only when a process is lost.
        """
        if not self.workers:
            for index in indices:
                yield index, finished(attempt(samples[index], config.limits), config)
            return
        waiting = deque()
        for index in indices:
            waiting.append((index, self.threads.submit(self._ask, samples[index], config)))
            if len(waiting) > ahead:
                index, future = waiting.popleft()
                yield index, future.result()
        yield from ((index, future.result()) for index, future in waiting)

    def _ask(self, sample: Sample, config: ImageConfig) -> View | InputError:
        """The same for one sample, by this thread and its process."""
        if not hasattr(self.mine, "process"):
            self.mine.connection, theirs = Pipe()
            environment = os.environ | {"OMP_NUM_THREADS": "1"}  # else numpy makes a thread per core, for nothing
            with theirs:
                command = [sys.executable, "-c", f"import sys; sys.path[0] = {ROOT!r}; {WORKER}"]
                self.mine.process = subprocess.Popen(command, stdin=theirs.fileno(), env=environment)
            self.processes.append(self.mine.process)
        # A target stays here: it may be of a class in a task's module, with which a worker would have to import torch.
        try:
            self.mine.connection.send((replace(sample, target=None, extra={}), config.limits))
            answer = self.mine.connection.recv()
        except (EOFError, ConnectionError):
            code = self.mine.process.wait()
            how = f"signal {-code} (9 is how a system ends one when memory is short)" if code < 0 else f"code {code}"
            raise InputError(
                f"{sample.source}: the process that reads pictures was ended by {how}; "
                "lower --workers, 0 reads in the main process"
            ) from None
        if isinstance(answer, Picture) and sample.target is not None:
            answer.target = sample.target
        return finished(answer, config)


def attempt(sample: Sample, limits: tuple[int, int, int]) -> Picture | InputError:
    """read_picture(), its InputError as a value: whether it may be left out is decided where the stream is read."""
    try:
        return read_picture(sample, *limits)
    except InputError as error:
        return error


def finished(answer: Picture | InputError, config: ImageConfig) -> View | InputError:
    return answer if isinstance(answer, InputError) else config.view(answer)


def serve() -> None:
    """A worker's life: samples in, pictures out, until the other side is gone."""
    signal(SIGINT, SIG_IGN)  # Ctrl-C is for the main process, as is what torchrun sends to all of them
    signal(SIGTERM, SIG_IGN)
    signal(SIGPIPE, SIG_DFL)  # whose end, while a picture is on its way, is this one's too, without a traceback
    connection = Connection(sys.stdin.fileno())
    while True:
        try:
            sample, limits = connection.recv()
        except (EOFError, ConnectionError):
            return
        connection.send(attempt(sample, limits))
