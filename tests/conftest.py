"""Settings of the whole suite: the Triton interpreter before triton is imported, one thread, no network."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported; kernels then run on CPU tensors
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings
