"""What the code costs: bytes, instructions and, on a GPU, time; ours beside the plain way."""
