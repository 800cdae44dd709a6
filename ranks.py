"""Several processes as one trainer: who this one is, and the few things that all of them do together.

    ranks.start("cuda")              torchrun said in the environment who is who; alone, nothing is set up
    table = ranks.gather(rows)           (size, ...) the rows of every rank
    scores = ranks.gather_fields(scores) the same for a dataclass of tensors, in one collective
    values = ranks.gather_objects(work)  what work() gave on each rank; an error on one is an error on all
    ranks.on_rank0(write)                on rank 0, while the others wait
    ranks.sum_gradients(parameters)      once an optimiser step, before the clipping
    ranks.shard(policy, ...)             instead of that: each rank keeps a size-th of the weights

Every rank runs the same program in the same order; a place of the endless stream of prompts belongs to rank
place % size. With one process each function is the identity and torch.distributed is never initialised.

No DistributedDataParallel: it reduces in the backward pass of its own forward(), which prefix() and logprobs() go
round, and would do it once a micro-batch. Nothing is pickled: values travel as JSON.

A rank that ends takes the others with it: torchrun ends them, and who waits for it says so and ends by itself. So does
torchrun, if it is killed and can end nobody: the system tells its ranks (Linux).

Left out: more than one way to split (tensor, pipeline), gradients that travel during the backward pass (replicated).
"""

import atexit
import ctypes
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from errors import InputError, cause_of

TIMEOUT = timedelta(minutes=30)  # of a collective: a checkpoint on a slow disk, the longest of all rollouts
# Seconds between the end of a program and that of its interpreter. The thread of gloo that did a collective still holds
# its tensors, and needs the interpreter to let them go; where it comes too late, it aborts the process (before Python
# 3.14). Nobody can wait for that thread: DTensor's caches keep a mesh, and the mesh keeps its process group.
LAST_BREATH = 0.5
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that comes when the parent ends
BUCKET = 2**26  # gradients added up at a time: the copy is 256 MB in fp32, or as large as the largest weight

rank, size = 0, 1
collectives = 0  # that this process took part in


def start(device: str) -> None:
    """Join the processes that torchrun started, if there are several; on CUDA each takes the GPU of its local rank."""
    global rank, size
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(own_device(device))  # "cuda" means this one from here on
    with _company():  # what lies on the CPU travels by gloo, gradients on a GPU by NCCL
        # torchrun's store outlives a restart: without a prefix, ranks may find addresses there of those before them.
        store, mine, count = next(rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=mine, world_size=count, timeout=TIMEOUT)
    rank, size = dist.get_rank(), dist.get_world_size()
    atexit.register(time.sleep, LAST_BREATH)


def end() -> None:
    """Leave the others, once all is done together."""
    global rank, size
    if size > 1:
        dist.destroy_process_group()
        rank, size = 0, 1


def own_device(device: str) -> str:
    """The device that is meant by "cuda" on this rank."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return f"cuda:{os.environ['LOCAL_RANK']}" if several and device == "cuda" else device


def check_device(name: str) -> str:
    """The device if tensors can be made there. InputError else."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("cpu and cuda are supported")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = f"{str(error).splitlines()[0]:.80}"
        raise InputError(f"--device {name} is not to be had here ({why}); use --device cpu") from None
    return name


def print0(text: str) -> None:
    """A line on the terminal, once."""
    if rank == 0:
        tqdm.write(text)


class Lost(InputError):
    """Another rank is gone: nothing can be done together any more."""


class Together(InputError):
    """An InputError on every rank at the same point: all may still do something together, such as save."""


@contextmanager
def _company():
    """Around every collective: it fails where another rank is gone."""
    global collectives
    collectives += 1
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            f"rank {os.environ['RANK']} waits for another one in vain ({cause_of(error)}); the one that ended says why"
        ) from None


def gather(rows: Tensor) -> Tensor:
    """rows (...) on the CPU, of one shape on all ranks -> (size, ...), in the order of ranks."""
    if size == 1:
        return rows[None]
    rows = rows.contiguous()
    table = rows.new_empty(size, *rows.shape)
    with _company():
        dist.all_gather(list(table.unbind(0)), rows)
    return table


def gather_fields(values: Any) -> Any:
    """A dataclass with tensors (n, G), or dicts of such, of one shape on all ranks -> the same with tensors
    (size, n, G); its other fields are left at their defaults. One collective, in which numbers travel as float64."""
    flat: dict[tuple, Tensor] = {}
    for f in fields(values):
        value = getattr(values, f.name)
        if isinstance(value, Tensor):
            flat[f.name,] = value
        elif isinstance(value, dict):
            flat |= {(f.name, key): part for key, part in value.items()}
    table = gather(torch.stack([tensor.double() for tensor in flat.values()], dim=-1))
    made: dict[str, Any] = {f.name: {} for f in fields(values) if isinstance(getattr(values, f.name), dict)}
    for (name, *key), column in zip(flat, table.unbind(-1), strict=True):
        column = column.to(flat[(name, *key)].dtype)
        if key:
            made[name][key[0]] = column
        else:
            made[name] = column
    return type(values)(**made)


def gather_objects(work: Callable[[], Any]) -> list:
    """[what work() gave on rank 0, on rank 1 ...], as JSON gives it back; all wait for all.

    An exception on one rank is one on all of them, so that all can go the same way: itself there, elsewhere an
    InputError with its words.
    """
    if size == 1:
        return [work()]
    failure = None
    try:
        message = {"value": work()}
    except Exception as error:
        failure, message = error, {"error": str(error) or type(error).__name__}
    data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    lengths = gather(torch.tensor([len(data)])).flatten().tolist()
    padded = gather(torch.nn.functional.pad(data, (0, max(lengths) - len(data))))
    if failure:
        raise failure
    messages = [json.loads(row[:n].numpy().tobytes()) for row, n in zip(padded, lengths, strict=True)]
    for message in messages:
        if "error" in message:
            raise InputError(message["error"])
    return [message["value"] for message in messages]


def on_rank0(work: Callable[[], Any]) -> None:
    """work() on rank 0, which writes the run's files; the others wait until it is done, and fail with it."""

    def alone() -> None:
        if rank == 0:
            work()

    gather_objects(alone)


def all_sum(numbers: list[float]) -> list[float]:
    """Each number summed over all ranks, in float64 and in the order of ranks."""
    if size == 1:
        return numbers
    return gather(torch.tensor(numbers, dtype=torch.float64)).sum(0).tolist()


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Make each .grad the sum over all ranks, the same bits on each. A sum and no mean: losses are normalised by the
    whole batch. A rank without a gradient adds 0."""
    parameters = [p for p in parameters if not isinstance(p, DTensor)]  # a shard's gradient is a sum already
    if size == 1:
        return
    buckets, room = [], 0
    for parameter in parameters:
        if parameter.numel() > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(parameter)
        room -= parameter.numel()
    for bucket in buckets:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        for parameter in bucket:
            parameter.grad = None  # its memory, before the next bucket asks for more
        with _company():
            dist.all_reduce(flat)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


# --------------------------------------------------------------------------------------------------------------- shards


def shard(policy: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Keep of a policy's weights, and of all that follows from them, a size-th on each rank (FSDP2): the weights stay
    as they are, each block is gathered in `dtype` when its turn comes, its gradients are summed in fp32 at least.

    Forward and backward passes are collectives then: every rank makes the same number of them (model.Policy.idle), but
    inside unsharded(). The policy may be on the CPU: it comes to the device block by block.
    """
    # A block's keys and values are views, and are never written to.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(torch.device(device).type, (size,))
    wide = torch.promote_types(next(policy.parameters()).dtype, torch.float32)
    # Angles of the rotary embedding are fp32 among activations of another dtype: nothing is cast on the way in.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    for module in (*policy.visual.blocks, *policy.model.layers, policy):  # embedding, head, norms: with the whole
        fully_shard(module, mesh=mesh, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)  # a sum and no mean,
        module.set_force_sum_reduction_for_comms(True)  # by an operation that gloo has too
        for method in ("cache_image_tokens", "prefix", "suffix", "logprobs"):  # what is called in place of forward()
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)


@contextmanager
def unsharded(policy: nn.Module) -> Iterator[None]:
    """Inside, a sharded policy is whole on each rank: passes without gradient need no other rank, and may end at
    different lengths. Entered by all ranks; costs the memory of all weights in the dtype of the arithmetic."""
    if not isinstance(policy, FSDPModule):
        yield
        return
    blocks = [module for module in policy.modules() if isinstance(module, FSDPModule)]  # the whole comes first
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(block is not policy, recurse=False)
            block.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor of which each rank has a part, in full on each; all ranks ask for it. Others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that each rank has in full, on the parameter's device, and sharded if that is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
