"""Where a run's numbers go beside metrics.jsonl: Weights & Biases or TensorBoard, where they are installed.

A log has write(row), a dict of one step's metrics of which the numbers are taken, and close(). Neither package is
needed: metrics.jsonl holds everything, and experiments/plot.py draws it.
"""

from pathlib import Path

from errors import InputError


def _numbers(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}


class Wandb:
    """wandb.ai; a resumed run is a new one in the same group. WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, out: Path, config: dict, first: int):
        import wandb

        self.run = wandb.init(project="medloc-grpo", group=out.name, name=f"{out.name}-{first}", dir=out, config=config)

    def write(self, row: dict) -> None:
        self.run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in out/tensorboard: tensorboard --logdir out."""

    def __init__(self, out: Path, config: dict, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(out / "tensorboard", purge_step=first + 1)

    def write(self, row: dict) -> None:
        for name, value in _numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()


LOGS = {"wandb": Wandb, "tensorboard": TensorBoard}


def open_log(name: str, out: Path, config: dict, first: int):
    """config is config.json's content; first is the number of steps that are done already."""
    try:
        return LOGS[name](out, config, first)
    except ImportError as error:
        raise InputError(f"--log {name}: the package is not installed (pip install {name}), or drop --log") from error
    except Exception as error:  # wandb without a login raises its own kinds
        raise InputError(f"--log {name}: cannot be opened ({error!s:.200}); drop --log, or mend that") from error
