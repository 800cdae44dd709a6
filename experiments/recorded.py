"""Recorded runs keep the words of their day. canonical() says which run of today a recipe means: the flags of the
schedules, the losses and the clipping have moved behind the names that they belong to (flags.py, GONE), and some have
gone.
"""

import shlex

STAGES = ((0.0, 0.8, 0.2), (0.6, 0.75, 0.35), (0.75, 0.55, 0.4))  # scheduler.py's, which old flags changed by column
SETTINGS = "tau_start tau_target window unit stale refresh min_margin beta1 beta2 delta0".split()
MOVED = {name: name for name in SETTINGS} | {"delta_schedule": "delta", "soft_scale": "scale", "fixed_tau": "tau"}
ENDS = {"progress-conservative": "0.6", "progress-moderate": "0.7", "progress-aggressive": "0.8"}


def canonical(recipe: str) -> list[tuple]:
    """ "train_sft.py --a 1; train_grpo.py --b 2" -> of each program (name, its flags in today's words, in no order)."""
    return [_program(shlex.split(part)) for part in recipe.split("; ")]


def _program(words: list[str]) -> tuple:
    name, *rest = words
    flags: dict[str, list[str]] = {}
    for word in rest:
        if word.startswith("--"):
            flags[word[2:].replace("-", "_")] = []
        elif flags:
            flags[next(reversed(flags))].append(word)
    flags.pop("samples_every", None)
    schedules = flags.pop("schedule", [])
    if schedules:
        schedule, _, rest = schedules[0].partition(":")
        settings = dict(part.split("=", 1) for part in rest.split(",")) if rest else {}
        if schedule in ENDS:
            settings["end"], schedule = ENDS[schedule], "progress"
        for old, new in MOVED.items():
            if old in flags:
                settings[new] = flags.pop(old)[0]
        for check in ("check_reward", "check_stability", "check_margin"):
            if flags.pop(f"no_{check}", None) is not None:
                settings[check] = "off"
        columns = [flags.pop("stages", None), flags.pop("min_hit_rate", None), flags.pop("max_sigma", None)]
        if any(columns):
            taus, rates, sigmas = ([float(v) for v in column or []] for column in columns)
            rows = zip([0.0, *taus] if taus else [r[0] for r in STAGES], rates or [r[1] for r in STAGES],
                       sigmas or [r[2] for r in STAGES], strict=True)  # fmt: skip
            settings["stages"] = "/".join(":".join(f"{number:g}" for number in row) for row in rows)
        flags["schedule"] = [schedule, *sorted(f"{key}={value}" for key, value in settings.items()), *schedules[1:]]
    return name, frozenset((flag, tuple(values)) for flag, values in flags.items())
