"""Triton's interpreter, made as unforgiving as a GPU. For tests only; install() once TRITON_INTERPRET=1 is set.

Stock, the interpreter of Triton 3.7 is kinder than the hardware or plainly wrong in seven places. After install():

    what a kernel does                     stock                               here
    bf16 arithmetic, comparisons, tl.dot   on the bit patterns, as integers    TypeError
    fp32 -> bf16                           truncates                           rounds to nearest even, as the hardware
    tl.minimum, tl.maximum of a NaN        NaN                                 the other operand, as min.f32 and max.f32
    masked load without other=             0                                   NaN, or the largest integer
    fp32 division by "/"                   exact                               x * (1 / y), an ulp off; div_rn is exact
    access outside the tensors passed in   whatever lies there, or a crash     IndexError
    order of the programs                  ascending                           descending

Still unseen: races inside a program, missing barriers, fused multiply-adds, the hardware's exp2 and log2.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle

_extents: list[tuple[int, int]] = []  # first and last + 1 address of every tensor of the launch that is running


def install() -> None:  # once in a process
    _arithmetic(InterpreterBuilder)
    _memory(InterpreterBuilder)


def _refusing_bf16(name: str, operation):
    def guarded(self, *operands):
        if any(isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16 for x in operands):
            raise TypeError(f"{name}: the interpreter has no bf16 arithmetic; cast to fp32 right after the load")
        return operation(self, *operands)

    return guarded


def _arithmetic(builder) -> None:
    cast, min_max = builder.cast_impl, ReduceOps.min_max

    def rounding_cast(self, x, to):
        a, b = x.dtype.scalar, to.scalar
        if tl.bfloat16 not in (a, b) or a == b:
            return cast(self, x, to)
        if {a, b} != {tl.bfloat16, tl.float32}:
            raise TypeError(f"{a} -> {b}: the interpreter converts bf16 to and from fp32 only")
        if b == tl.float32:
            return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        rounded = torch.from_numpy(np.array(x.data, dtype=np.float32)).to(torch.bfloat16)  # torch rounds to even
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def divide(self, x, y):
        off = x.data.dtype == np.float32
        return self.binary_op(x, y, (lambda a, b: a * (np.float32(1) / b)) if off else np.divide)

    def extreme(self, values, val_reduce_op, idx_reduce_op=None):
        dropping = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}  # the same, but for a warning
        return min_max(self, values, dropping.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    ReduceOps.min_max, builder.cast_impl, builder.create_fdiv = extreme, rounding_cast, divide
    builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    floats = ("create_f", "create_min", "create_max", "create_exp", "create_log", "create_sqrt", "create_rsqrt")
    for name in dir(builder):
        if name == "create_dot" or (name.startswith(floats) and not name.startswith("create_fp_")):  # those are casts
            setattr(builder, name, _refusing_bf16(name, getattr(builder, name)))


def _extent(x: torch.Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()


def _check(pointers, mask) -> None:
    """Every address that is used lies in one of the launch's tensors, and all of one access in the same one."""
    used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    if used.size:
        first, last = int(used.min()), int(used.max()) + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if not any(start <= first and last <= end for start, end in _extents):
            raise IndexError(f"addresses from {first:#x} to {last:#x} are not inside any tensor of the launch")


def _memory(builder) -> None:
    load, store = builder.create_masked_load, builder.create_masked_store
    prepare, run, place = GridExecutor._init_args_hst, GridExecutor.__call__, builder.set_grid_idx

    def noting(self, args, kwargs):
        host_args, host_kwargs = prepare(self, args, kwargs)
        tensors = (x for x in (*host_args, *host_kwargs.values()) if isinstance(x, torch.Tensor))
        _extents[:] = [_extent(x) for x in tensors if x.numel()]
        return host_args, host_kwargs

    def quiet(self, *args, **kwargs):
        with np.errstate(all="ignore"):  # a GPU says nothing about inf - inf
            return run(self, *args, **kwargs)

    def checked_load(self, pointers, mask, other, *rest):
        _check(pointers, mask)
        if other is None and not mask.data.all():
            element = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            integer = None if element.is_floating() else np.iinfo(dtype).max
            poison = 0x7FC0 if element == tl.bfloat16 else integer or np.nan
            other = TensorHandle(np.full(pointers.data.shape, poison, dtype), element)
        return load(self, pointers, mask, other, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        _check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def from_the_last(self, *index):
        place(self, *(n - 1 - i for n, i in zip(self.grid_dim, index, strict=True)))

    GridExecutor._init_args_hst, GridExecutor.__call__, builder.set_grid_idx = noting, quiet, from_the_last
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
