"""Whether what a checkpoint's trainer.json says is something that a run of these flags can have saved.

Sums are no protection against an edited or foreign file: each field is held against what it must be, and an InputError
names the file, the field and the way on.
"""

from pathlib import Path

import tasks
from errors import InputError, one_line
from scheduler import SLACK, Schedule


def way_on(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    return f"remove {folder} and --resume goes on from the checkpoint before"


def is_count(value: object, most: int = 2**53) -> bool:
    """Whether it is a whole number from 0 to `most`, by default the last that a float can count to."""
    return type(value) is int and 0 <= value <= most


def require(folder: Path, state: dict, name: str, ok: bool, rule: str) -> None:
    if not ok:
        found = one_line(repr(state[name])) if name in state else "missing"
        raise InputError(f"{folder}/trainer.json: field '{name}' must be {rule}, it is {found}; {way_on(folder)}")


def check_state(folder: Path, state: dict, batch_size: int, inner_steps: int) -> None:
    """InputError if what a GRPO run keeps in a state (Run.save) is none that a run of this batch size and these
    inner steps can have saved."""
    step = state["step"]
    most, least = step * inner_steps, step * batch_size
    drawn, bad, evaluation, schedule = (state.get(name) for name in ("drawn", "bad", "evaluation", "schedule"))
    fine = isinstance(schedule, list) and all(
        isinstance(s, dict) and is_count(s.get("step")) and s["step"] == step for s in schedule
    )
    require(folder, state, "schedule", fine, f"a list of objects whose 'step' is {step}")  # the rest is its own affair
    fine = state["optimizer_steps"] <= most
    require(folder, state, "optimizer_steps", fine, f"at most {most}, the inner steps of {step} steps")
    fine = is_count(drawn) and drawn >= least
    require(folder, state, "drawn", fine, f"a whole number of at least {least}, the prompts of {step} steps")
    fine = is_count(state.get("bad_in_a_row"), step)
    require(folder, state, "bad_in_a_row", fine, f"a whole number from 0 to {step}")
    words = isinstance(bad, dict) and all(isinstance(said, str) and said.isprintable() for said in bad.values())
    require(folder, state, "bad", words, "an object of printable sentences")
    check_results(folder, state)
    history = evaluation.get("history")
    fine = isinstance(history, list) and all(is_result(row) and is_count(row.get("step"), step) for row in history)
    steps = [row["step"] for row in history] if fine else []
    fine = fine and {"start", "final"} <= evaluation.keys() and steps == sorted(set(steps))
    require(folder, state, "evaluation", fine, "an object of 'start', 'final' and 'history', results of rising steps")


def check_schedules(folder: Path, state: dict, schedules: dict[tuple[str, str], Schedule]) -> None:
    """InputError if a state's schedules are none that these could have saved."""
    found = [(saved.get("dataset"), saved.get("task")) for saved in state["schedule"]]
    names = ", ".join("/".join(key) for key in schedules)
    require(folder, state, "schedule", found == list(schedules), f"a list with one for each of {names}")
    for saved, schedule in zip(state["schedule"], schedules.values(), strict=True):
        none, window = schedule.tau is None, saved.get("window")
        size = schedule.window.size

        def is_tau(tau: object, none: bool = none) -> bool:
            return tau is None if none else type(tau) in (int, float) and 0 <= tau <= 1

        def is_entry(entry: object, is_tau=is_tau) -> bool:
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
                return False
            return is_tau(entry[0]) and entry[1] != [] and all(type(u) in (int, float) and is_u(u) for u in entry[1])

        fine = isinstance(window, list) and len(window) <= size and all(map(is_entry, window))
        require(folder, saved, "window", fine, f"a list of at most {size} pairs [tau, [u, ...]]")
        require(folder, saved, "tau", is_tau(saved.get("tau")), "null" if none else "from 0 to 1")


def is_u(value: float) -> bool:
    return -SLACK <= value <= 1 + SLACK


def check_results(folder: Path, state: dict) -> None:
    """InputError if a state's evaluations, train_sft.py's too, are none that can be shown."""
    evaluation = state.get("evaluation")
    fine = isinstance(evaluation, dict) and all(
        is_result(evaluation[name]) for name in ("start", "final", "exact_sft") if evaluation.get(name) is not None
    )
    require(folder, state, "evaluation", fine, "an object of results, each of which can be shown")


def is_result(value: object) -> bool:
    """Whether it is what eval.py makes of an evaluation, as far as it is shown."""
    try:
        counted = isinstance(value, dict) and is_count(value.get("n")) and is_count(value.get("parse_failures"))
        return counted and len(tasks.summary("", value)) > 0
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
