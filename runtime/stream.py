"""The endless stream of training prompts: which sample stands at which place, read ahead, dealt out to the ranks.

Place p of the stream belongs to rank p % size. Order and uniforms follow from (seed, step, place, sample), never from
state or wall clock: a resumed run goes on as if never stopped, and any number of ranks sees the same data.
"""

import itertools
import math
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ranks
from data import BadRecords
from errors import InputError
from images import Sample, View
from prompts import Processor, Prompt
from runtime.readers import Readers

GOLDEN = (5**0.5 - 1) / 2


class Sampler:
    """Endless batches of sample indices. Epochs run into each other, so nothing is dropped, whatever the batch size.

    A batch follows from (seed, step) alone: there is no state to save, a resumed run cannot repeat or skip, and any
    number of ranks can cut the same batch among themselves.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        if n < 1 or batch_size < 1 or seed < 0:
            raise InputError(f"{n} samples, batch size {batch_size}, seed {seed}: must be at least 1, 1 and 0")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def indices(self, step: int) -> list[int]:
        """The batch_size indices in [0, n) of a step, counted from 0."""
        return self.take(step * self.batch_size, self.batch_size)

    def take(self, first: int, count: int) -> list[int]:
        """The indices at places first .. first + count - 1 of the endless stream."""
        return [int(self._order_of(k // self.n)[k % self.n]) for k in range(first, first + count)]

    def _order_of(self, epoch: int) -> np.ndarray:
        """The permutation (n,) of an epoch; only the latest is kept."""
        if epoch != self._epoch:
            # Sorting Philox's raw words: numpy promises those for ever, its permutation() only within a version.
            words = np.random.Philox(key=[self.seed, epoch]).random_raw(self.n)
            self._epoch, self._order = epoch, np.argsort(words, kind="stable")
        return self._order


class Mixture(Sampler):
    """A Sampler of several datasets, each with a share of the places: weights / their sum, whatever their sizes.

    Place k belongs to the dataset into whose part of [0, 1) the k-th multiple of the golden ratio falls: of any run of
    places every dataset has its share, to about one. Within a dataset, permutation after permutation.
    """

    def __init__(self, datasets: list[str], weights: dict[str, float], batch_size: int, seed: int):
        super().__init__(len(datasets), batch_size, seed)
        names = sorted(weights)
        self.members = [np.flatnonzero(np.array(datasets, object) == name) for name in names]
        ends = np.cumsum([weights[name] for name in names])
        self.bounds = ends / ends[-1]  # the last one is 1 exactly, so every turn below it is somebody's
        start = np.random.Philox(key=[seed, 2**62]).random_raw(1)[0]  # a number that no epoch has
        self.start = float(start >> np.uint64(11)) * 2.0**-53
        self.at, self.counts = 0, np.zeros(len(names), np.int64)  # places that were counted, of each dataset
        self.orders: dict[int, tuple[int, np.ndarray]] = {}  # dataset -> (epoch, its permutation)

    def owners(self, first: int, count: int) -> np.ndarray:
        """The datasets' indices at places first .. first + count - 1."""
        turns = (self.start + np.arange(first, first + count) * GOLDEN) % 1.0
        return np.searchsorted(self.bounds, turns, side="right")

    def take(self, first: int, count: int) -> list[int]:
        if first < self.at:
            self.at, self.counts = 0, np.zeros_like(self.counts)
        while self.at < first:  # a resumed run counts what came before it
            many = min(first - self.at, 2**20)
            self.counts += np.bincount(self.owners(self.at, many), minlength=len(self.counts))
            self.at += many
        found = []
        for owner in self.owners(first, count).tolist():
            found.append(int(self.members[owner][self._place(owner, int(self.counts[owner]))]))
            self.counts[owner] += 1
        self.at = first + count
        return found

    def _place(self, owner: int, k: int) -> int:
        """The k-th sample of a dataset's own endless stream."""
        epoch, at = divmod(k, len(self.members[owner]))
        if self.orders.get(owner, (-1,))[0] != epoch:
            words = np.random.Philox(key=[self.seed, (owner + 1) * 2**40 + epoch]).random_raw(len(self.members[owner]))
            self.orders[owner] = epoch, np.argsort(words, kind="stable")
        return int(self.orders[owner][1][at])


def sampler_of(samples: list[Sample], batch_size: int, seed: int) -> Sampler:
    """By the weights that --data gives its files, or of all samples alike. InputError if a dataset has two weights, or
    only some have one, or there is one dataset only: files of one name are one, unless their records name theirs."""
    weights: dict[str, float | None] = {}
    for sample in samples:
        if weights.setdefault(sample.dataset, sample.weight) != sample.weight:
            raise InputError(f"--data: dataset {sample.dataset!r} has two weights; give its files one")
    if set(weights.values()) == {None}:
        return Sampler(len(samples), batch_size, seed)
    if without := [name for name, weight in weights.items() if weight is None]:
        raise InputError(f"--data: dataset {without[0]!r} has no weight, others have; write FILE=WEIGHT for each")
    if len(weights) == 1:
        only = f"all records are of dataset {min(weights)!r}, so its weight changes nothing"
        raise InputError(f"--data: {only}; drop it, or name the datasets apart (field 'dataset', or the files' names)")
    return Mixture([sample.dataset for sample in samples], weights, batch_size, seed)


class Stream:
    """Its only state is `drawn`: how many places are used up, on all ranks; what was read ahead is read again by a
    resumed run. Without readers each picture is read when its turn comes."""

    def __init__(
        self,
        samples: list[Sample],
        processor: Processor,
        bad: BadRecords,
        batch_size: int,
        group_size: int,
        max_tokens: int,
        seed: int,
        readers: Readers | None = None,
    ):
        self.samples, self.processor, self.bad, self.drawn = samples, processor, bad, 0
        self.batch_size, self.group_size, self.max_tokens, self.seed = batch_size, group_size, max_tokens, seed
        self.keys = sorted({sample.key for sample in samples})  # (dataset, task), the same on all ranks
        self.sampler = sampler_of(samples, batch_size, seed)
        self.readers = readers or Readers(0)
        self.views = self._read()
        self.step, self.first = -1, 0  # the step at hand, and the place at which it began
        self.places = range(0)  # last drawn, of all ranks
        self.good: list[int] = []  # which of this rank's own among them have a picture, by their order
        self.failures: list[tuple[int, str, str]] = []  # of those that have none: place, source, sentence
        self.fault: InputError | None = None  # why nothing can be drawn any more
        self.failed = 0  # places in a row without a picture
        self.seconds = 0.0  # that draw() has taken in this step: what it waits for

    def _mine(self, places: range) -> range:
        """Those of the places that belong to this rank."""
        return range(places.start + (ranks.rank - places.start) % ranks.size, places.stop, ranks.size)

    def _read(self) -> Iterator[tuple[int, View | InputError]]:
        """(index of the sample, view of its picture) at this rank's places, from the first draw's on."""
        first = self._mine(range(self.drawn, sys.maxsize)).start
        indices = (self.sampler.take(place, 1)[0] for place in itertools.count(first, ranks.size))
        ahead = math.ceil(self.batch_size / ranks.size)
        yield from self.readers.read(indices, self.samples, self.processor.image_config, ahead=ahead)

    def draw(self, step: int, count: int) -> tuple[list[Prompt], Tensor]:
        """The prompts at this rank's share of the next `count` places, and their uniforms (B, G, T). A place whose
        picture cannot be read gives none (self.failures)."""
        started = time.perf_counter()
        if step != self.step:
            self.step, self.first, self.seconds = step, self.drawn, 0.0
        self.places, self.good, self.failures, self.fault = range(self.drawn, self.drawn + count), [], [], None
        prompts, slots, indices = [], [], []
        for i, place in enumerate(self._mine(self.places)):
            try:
                index, view = next(self.views)
            except InputError as error:  # a reader is lost
                prompts, slots, indices, self.good, self.fault = [], [], [], [], error
                break
            try:
                prompts.append(self.processor.prompt(self.samples[index], view))
            except InputError as error:
                self.failures.append((place, self.samples[index].source, str(error)))
                continue
            slots.append(place - self.first)
            indices.append(index)
            self.good.append(i)
        numbers = uniforms(self.seed, step, slots, indices, self.group_size, self.max_tokens)
        self.seconds += time.perf_counter() - started
        return prompts, numbers

    def advance(self, count: int, failures: list[tuple[int, str, str]]) -> None:
        """All ranks are through with the next `count` places, with these failures in all."""
        self.drawn += count
        self.failed = self.failed + count if len(failures) == count else 0
        for _, source, sentence in sorted(failures):
            self.bad.add(source, InputError(sentence))
            if self.failed > len(self.samples):
                raise InputError(f"no picture of --data can be read any more; the last one: {sentence}")
            ranks.print0(f"left out: {sentence}")


def uniforms(seed: int, step: int, slots: list[int], indices: list[int], group: int, tokens: int) -> Tensor:
    """(B, G, T) in [0, 1): what each completion token is sampled with, from (seed, step, place in the batch,
    sample)."""
    numbers = np.empty((len(slots), group, tokens), np.float32)
    for row, slot, index in zip(numbers, slots, indices, strict=True):
        key = np.random.SeedSequence([seed, step, slot, index])
        np.random.Generator(np.random.PCG64(key)).random(dtype=np.float32, out=row)
    return torch.from_numpy(numbers)
