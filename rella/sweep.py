"""Sweeps: a space of settings → trials → the best of each N, and files that run them again. Pure; Ray is elsewhere."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rella.artifacts import Json
from rella.baselines import TextBaseline
from rella.cli import build
from rella.config import Experiment, Values, leaves
from rella.errors import InputError, MissingError
from rella.sweep_config import Shots, SweepConfig

MODULES = {"reit": "tune_spaces.reit", **dict.fromkeys(get_args(TextBaseline), "tune_spaces.textctr")}
"""Where a method's space is; the ID-based baselines' in `tune_spaces.ctr`."""
RANGE_KEYS = {"low": float, "high": float, "log": bool}


@dataclass(frozen=True)
class Range:
    """A continuous choice."""

    low: float
    high: float
    log: bool = False

    def draw(self, rng: np.random.Generator) -> float:
        """Return a value of it, rounded to four digits so that a file holds it exactly."""
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = float(rng.uniform(*ends))
        return float(f"{math.exp(value) if self.log else value:.4g}")


Axis = Sequence[Json] | Range
Space = Mapping[str, Axis]


@dataclass(frozen=True)
class Trial:
    """One setting."""

    values: Values
    """Field of the experiment → value, of the fields that the space names."""
    experiment: Experiment

    @property
    def shots(self) -> Shots:
        """N, within which trials are compared."""
        return self.experiment.shots

    def __str__(self) -> str:
        own = ", ".join(f"{n.rpartition('.')[2]} {v}" for n, v in self.values.items() if n != "shots")
        return f"N = {self.shots}" + (f", {own}" if own else "")


@dataclass
class Finished:
    """A trial and what its validations said."""

    trial: Trial
    valid: Mapping[str, float]
    """Metrics of its best step on the validation rows."""
    seconds: float = 0.0
    stopped: bool = False
    """Whether early stopping ended it; its metrics are then those of its best step until there."""
    artifact: str = ""
    """Where what it trained lies."""


def read_space(config: SweepConfig, dataset: str) -> Space:
    """Return the space that is asked for.

    Raises:
        MissingError: no such file.
        InputError: not YAML, no such field, an empty list, a range that is none; names file and key.
    """
    if config.space in ("grid", "wide"):
        module = importlib.import_module(MODULES.get(config.method, "tune_spaces.ctr"))
        found = getattr(module, "space" if config.space == "grid" else "wide", None)
        if found is None:
            raise InputError(f"--sweep.space wide: {config.method} has the paper's grid only; give a YAML file")
        raw: Mapping[str, Any] = found(dataset, config.method)
        return _checked(raw, f"{module.__name__}")
    return _checked(_file(config.space), config.space)


def _file(path: str) -> Mapping[str, Any]:
    import yaml

    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingError(f"--sweep.space {path}: there is no such file; give grid, wide or a YAML file")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}: give field: [value, ...] or field: {{low: ..., high: ..., log: ...}}")
    return {str(name).replace("-", "_"): axis for name, axis in found.items()}


def _checked(raw: Mapping[str, Any], where: str) -> Space:
    known = {name for name, _, stages in leaves(Experiment()) if stages}
    found: dict[str, Axis] = {}
    for name, axis in raw.items():
        if name not in known:
            raise InputError(f"{where}: {name} is no field that changes a result; --help lists them")
        found[name] = _range(axis, f"{where}: {name}") if isinstance(axis, Mapping) else _values(axis, where, name)
    return found


def _values(axis: object, where: str, name: str) -> Sequence[Json]:
    if not isinstance(axis, list | tuple) or not axis:
        raise InputError(f"{where}: {name} is {axis!r}; give a list of values or {{low: ..., high: ..., log: ...}}")
    return [tuple(value) if isinstance(value, list) else value for value in axis]


def _range(axis: Mapping[str, Any], where: str) -> Range:
    wrong = [key for key, value in axis.items() if key not in RANGE_KEYS or isinstance(value, str)]
    if wrong or not {"low", "high"} <= axis.keys():
        raise InputError(f"{where}: {dict(axis)!r}; a range has the keys low, high and log (true or false)")
    found = Range(float(axis["low"]), float(axis["high"]), bool(axis.get("log", False)))
    if not found.low < found.high or (found.log and found.low <= 0):
        raise InputError(f"{where}: low must be less than high, and above 0 with log")
    return found


def trials_of(config: SweepConfig, experiment: Experiment) -> list[Trial]:
    """Return every setting once, in an order that does not depend on anything else.

    Args:
        config: space, N, and how many are drawn where a range is continuous.
        experiment: what the trials have in common.

    Raises:
        InputError: a field that does not exist, a value of the wrong type.
    """
    space = dict(read_space(config, experiment.dataset))
    _check_types(space)
    counts = _counts(config, experiment, space.pop("shots", None))
    drawn = any(isinstance(axis, Range) for axis in space.values())
    base = experiment if config.method == "reit" else with_values(experiment, {"baseline.model": config.method})
    found: dict[Experiment, Trial] = {}
    for n in counts:
        for values in _drawn(space, config) if drawn else _grid(space):
            chosen = {"shots": n, **values}
            one = with_values(base, chosen)
            found.setdefault(one, Trial(chosen, one))
    return list(found.values())


def with_values(experiment: Experiment, values: Values) -> Experiment:
    """Return the experiment with these dotted fields, which are of the right types."""
    own = {name: value for name, value in values.items() if "." not in name}
    for group in {name.partition(".")[0] for name in values.keys() - own.keys()}:
        inner = {n.partition(".")[2]: v for n, v in values.items() if n.startswith(f"{group}.")}
        own[group] = replace(getattr(experiment, group), **inner)
    return replace(experiment, **own)


def _check_types(space: Space) -> None:
    """Raise InputError for a value that a field does not take; a whole grid would take minutes."""
    for name, axis in space.items():
        for value in (axis.low, axis.high) if isinstance(axis, Range) else axis:
            build({name: value})


def _counts(config: SweepConfig, experiment: Experiment, listed: Axis | None) -> Sequence[Shots]:
    if config.shots != "auto":
        return config.shots
    if listed is None or isinstance(listed, Range):
        return (experiment.shots,)
    return tuple(listed)


def _grid(space: Space) -> Iterator[Values]:
    axes = [axis for axis in space.values() if not isinstance(axis, Range)]
    for values in itertools.product(*axes):
        yield dict(zip(space, values, strict=True))


def _drawn(space: Space, config: SweepConfig) -> Iterator[Values]:
    # The same settings for every N, so that their curves compare like with like.
    rng = np.random.default_rng(config.seed)
    for _ in range(config.trials):
        yield {
            name: axis.draw(rng) if isinstance(axis, Range) else axis[int(rng.integers(len(axis)))]
            for name, axis in space.items()
        }


def best_by_shots(finished: Sequence[Finished]) -> dict[Shots, Finished]:
    """Return for each N the trial with the highest validation AUC (then the lowest log loss); N ascending, `all` last.

    A trial that early stopping ended is not among them.
    """
    found: dict[Shots, Finished] = {}
    for one in finished:
        before = found.get(one.trial.shots)
        if not one.stopped and (before is None or _rank(one) > _rank(before)):
            found[one.trial.shots] = one
    return dict(sorted(found.items(), key=lambda item: math.inf if item[0] == "all" else item[0]))


def _rank(one: Finished) -> tuple[float, float]:
    return one.valid["auc"], -one.valid.get("log_loss", math.inf)


def yaml_of(trial: Trial, said: Values, note: str) -> str:
    """Return a file for `--config` that runs the trial's setting again.

    Args:
        trial: whose values it has.
        said: what the sweep's user set, by field.
        note: first line, a comment.
    """
    import yaml

    from rella.cli import nest

    fields = {**said, **trial.values}
    if trial.experiment.baseline.model != Experiment().baseline.model:
        fields["baseline.model"] = trial.experiment.baseline.model
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return f"# {note}\n" + yaml.safe_dump(nest(plain), sort_keys=False)
