"""Settings of the whole suite: Triton's interpreter and its guard before any kernel is made, threads, no network.

Two runs are held equal bit by bit in many tests, one of them in a process of its own at times. Sums split among another
number of threads differ in their last digits: so the number is set here alone, before torch is imported and by the
environment, which all processes share. `OMP_NUM_THREADS=4 pytest` takes another one, at most one a core.

`python -m pytest -m gpu` leaves the interpreter off: it runs the real kernels, and needs a GPU.
"""

import gc
import importlib.util
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: a second thread costs more than it brings
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell does that to what it starts behind its back (&)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    on_a_gpu = "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr
    if on_a_gpu or importlib.util.find_spec("triton") is None:
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; kernels then also run on CPU tensors
    if os.environ["TRITON_INTERPRET"] == "1":
        import interpreter_guard

        interpreter_guard.install()


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
