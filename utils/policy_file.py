"""policy.json: written, read, and refused where it does not fit the run."""
from pathlib import Path

import numpy as np

from utils import cli
from utils.cli import InputError
from utils.results_file import changed_settings, threshold_settings


def write(path, record):
    """A policy's numbers (dict) as JSON."""
    cli.write_atomically(Path(path), cli.strict_json(record, indent=1))


def settings_of(settings):
    """The settings under which a policy's evidence is bought (dict). The votes' fixed weights do not matter
    to it."""
    free = ("policy", "budget", "accuracy", "risk", "tau1", "tau2", "tau3", "weight", "top_share")
    return {key: value for key, value in threshold_settings(settings).items() if key not in free}


def read(settings, sources, features, fields):
    """--policy FILE -> (coefficients (D,), scale, {field: value}); None for "paper".

    settings, sources: of this run. features, fields: the names of the coefficients and of what else is
    stored. Raises InputError.
    """
    path = settings.policy
    if path == "paper":
        if settings.budget or settings.accuracy or settings.risk:
            raise InputError("--budget, --accuracy and --risk need a fitted policy; add --policy policy.json")
        return None
    for flag, unset, instead in (("early_exit", "off", "a fitted policy stops by itself"),
                                 ("abstain", "", "give --risk, which the policy certifies")):
        if getattr(settings, flag) != unset:
            raise InputError(f"--{flag} {getattr(settings, flag)} belongs to --policy paper; {instead}")
    try:
        stored = cli.parse_json(Path(path).read_text())
        coefficients = np.array([stored["coefficients"][name] for name in features], float)
        scale = tuple(tuple(map(float, pair)) for pair in stored["scale"])
        values = {name: stored[name] for name in fields}
        fitted = {**values["about"].get("settings", {}), **values["about"].get("sources", {})}
        if not np.isfinite(coefficients).all() or len(scale) != 2:
            raise ValueError("a coefficient is not finite")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--policy {path!r} is neither 'paper' nor a file that eval.py has written "
                         f"({type(error).__name__}); give its policy.json") from error
    current = settings_of(settings) | (sources or {})
    defaults = settings_of(type(settings)()) | dict.fromkeys(sources or {})
    if changed := changed_settings(fitted, {k: v for k, v in current.items() if fitted}, defaults):
        then, now = (", ".join(f"{key} {side.get(key, defaults.get(key))}" for key in changed)
                     for side in (fitted, current))
        raise InputError(f"--policy {path!r} was fitted with {then}, this run has {now}; use the same, or "
                         f"fit it again")
    return coefficients, scale, values


def tables(words, coefficients, at, rises):
    """words: {feature: what it is}; rises: {purchase: mean rise of P at each P of `at`} -> text."""
    rows = {name: {"coefficient": float(w), "": text} for (name, text), w in zip(words.items(), coefficients)}
    title = "\n\nrise of P by a purchase, before and after the Expert was heard\n"
    return cli.table(rows) + title + cli.table(
        {name: {f"P {p}": float(rise) for p, rise in zip(at, row)} for name, row in rises.items()})
