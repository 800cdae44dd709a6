"""Triton if this machine has it. Without it (Windows, macOS, a CPU-only wheel) the kernels stay plain functions that
nothing calls, and every operation runs its PyTorch reference."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

    class tl:  # what the signatures of the kernels need in order to be read at all
        constexpr = float


def jit(kernel):
    """triton.jit, or the function itself where there is no Triton."""
    return kernel if triton is None else triton.jit(kernel)


def launch_options(config: dict) -> dict:
    """A row of a configuration table as launch arguments here. The tables count warps of 32 threads; AMD's have 64."""
    return config | {"num_warps": max(1, config["num_warps"] // 2)} if torch.version.hip else config
