"""The command line that every job shares: YAML files, presets, flags, and where each value came from.

Later layers win: defaults of the data set and model, `--preset`, `--config` files, flags. An unknown key is an error in
each of them.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from rella.config import BASELINES, DATASETS, MODELS, PRESETS, TOGETHER, Experiment, Values, leaves
from rella.dataset_file import DatasetFile, is_dataset_file, read_dataset_file
from rella.errors import InputError
from rella.report_config import ReportConfig
from rella.sweep_config import SweepConfig

GROUPS: dict[str, type[SweepConfig] | type[ReportConfig]] = {"sweep": SweepConfig, "report": ReportConfig}
"""Flags of single jobs, beside the experiment's."""


@dataclass(frozen=True)
class Resolved:
    """An experiment and, for each field that is not at its default, the layer that set it."""

    experiment: Experiment
    sources: Mapping[str, str]
    show: int = 0
    """Samples to print instead of running the job."""
    plan: str = ""
    """Cluster to plan for instead of running the job."""
    sweep: SweepConfig | None = None
    """Of a sweep."""
    report: ReportConfig | None = None
    """Of a report."""

    def describe(self) -> str:
        """Return every resolved value, grouped by the layer that set it."""
        groups: dict[str, list[str]] = {}
        for name, value, _ in leaves(self.experiment):
            text = value if isinstance(value, str) else json.dumps(value)
            groups.setdefault(self.sources.get(name, "default"), []).append(f"{name}={text}")
        wrapped = (
            textwrap.fill(" ".join(found), 116, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
            for found in groups.values()
        )
        return "\n".join(f"  set by {source}:\n{lines}" for source, lines in zip(groups, wrapped, strict=True))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"tune": {"clip": 1}}` as `{"tune.clip": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: Values) -> dict[str, Any]:
    """Return `{"tune.clip": 1}` as `{"tune": {"clip": 1}}`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        level = nested
        for key in path:
            level = level.setdefault(key, {})
        level[last] = value
    return nested


def _parser(prog: str, description: str, group: str = "") -> Any:  # noqa: ANN401 - jsonargparse is untyped here
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings
    from jsonargparse.typing import PositiveInt

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # Without abbreviations: a key that is cut short is unknown.
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of fields; flags after it win.")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="A named setting of the paper.")
    parser.add_argument(
        "--show", type=PositiveInt, metavar="N", help="Print N samples as the model reads them and leave."
    )
    parser.add_argument(
        "--plan",
        metavar="CLUSTER",
        help="Print what the job would take on a cluster and leave: memory term by term, time, whether it fits and "
        "what to change. 8xv100-32gb, 2x8xa100-80gb (nodes × cards), or a YAML file.",
    )
    parser.add_argument("--show_config", action="store_true", help="Print every resolved value and leave.")
    parser.add_class_arguments(Experiment, nested_key=None)
    if group:
        parser.add_class_arguments(GROUPS[group], nested_key=group)
    return parser


def build(values: Values) -> Experiment:
    """Return the experiment with these dotted fields over the defaults, types checked.

    Raises:
        InputError: an unknown field or a value of the wrong type, named.
    """
    from jsonargparse import ArgumentParser

    known = {name for name, _, _ in leaves(Experiment())}
    unknown = sorted(set(values) - known)
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise InputError(f"configuration: there is no field {names}; --help lists them{_meant(names)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Experiment, nested_key=None)
    try:
        chosen = parser.parse_object(nest(values))
    except Exception as error:
        raise InputError(f"configuration: {error}") from error
    init = parser.instantiate(chosen)
    return Experiment(**{name: getattr(init, name) for name in asdict(Experiment())})


def resolve(given: Values, preset: str | None = None, origins: Mapping[str, str] | None = None) -> Resolved:
    """Lay the presets under the values that were given and return the experiment with each value's origin.

    Args:
        given: dotted field → value.
        preset: a named setting of `config.PRESETS`.
        origins: where each given value came from; "call" where it is not said.

    Raises:
        InputError: an unknown data set, preset, field or type.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; there are {', '.join(sorted(PRESETS))}")
    named = PRESETS[preset] if preset is not None else {}
    upper = {**named, **given}
    default = Experiment()
    dataset, model = upper.get("dataset", default.dataset), upper.get("model", default.model)
    baseline = upper.get("baseline.model", default.baseline.model)
    own: Values = {}
    if is_dataset_file(dataset):
        described = _described(dataset)
        own = {**_settings(described, dataset), "dataset_file": str(Path(dataset).expanduser().absolute())}
        given = {**given, "dataset": described.name}
    elif dataset not in DATASETS and "dataset_file" not in upper:
        raise InputError(
            f"unknown data set {dataset!r}; there are {', '.join(sorted(DATASETS))}, or give a YAML file that "
            "describes your own (docs/data.md)"
        )
    layers: list[tuple[str, Values]] = [
        (f"data set {dataset}", {**DATASETS.get(dataset, {}), **own}),
        (f"model {model}", MODELS.get(model, {})),
        (f"{dataset} with {model}", TOGETHER.get((dataset, model), {})),
        (f"baseline {baseline}", BASELINES.get(baseline, {})),
        (f"preset {preset}", named),
    ]
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        values |= layer
        sources |= dict.fromkeys(layer, source)
    sources |= {name: (origins or {}).get(name, "call") for name in given}
    return Resolved(build({**values, **given}), sources)


def _settings(described: DatasetFile, path: str) -> Values:
    """Return the values of a data set's file; a split column that is there counts unless the settings say otherwise."""
    found = {name.replace("-", "_"): value for name, value in flatten(described.settings).items()}
    if described.interactions.split is not None:
        found = {"data.split_by": "column", **found}
    try:
        build(found)
    except InputError as error:
        raise InputError(f"{path}: settings: {error}") from error
    return found


def _described(path: str) -> DatasetFile:
    try:
        found = read_dataset_file(path)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    taken = {"dataset", "dataset_file"} & set(found.settings)
    if taken:
        raise InputError(f"{path}: settings.{min(taken)} cannot be set by the data set itself; remove it")
    return found


def parse(argv: Sequence[str] | None, prog: str, description: str, group: str = "") -> Resolved:
    """Parse a job's command line; with the flags of a group of `GROUPS` too, a sweep's or a report's.

    `--help` and `--show-config` print and leave; a wrong flag leaves with status 2.

    Raises:
        InputError: an unknown data set, preset, field or type.
    """
    parser = _parser(prog, description, group)
    words = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        parsed = parser.parse_args(words, defaults=False).as_dict()
    except ArgumentError as error:
        where = _broken_file(parser, words)
        print(f"{prog}: error: {where}{error}{_meant(str(error))}\n(--help lists every flag)", file=sys.stderr)
        sys.exit(2)
    preset = parsed.pop("preset", None)
    show, samples, cluster = parsed.pop("show_config", False), parsed.pop("show", None), parsed.pop("plan", None)
    own = parsed.pop(group, {})
    files = {
        f"file {f}": flatten(parser.parse_path(str(f), defaults=False).as_dict()) for f in parsed.pop("config", ())
    }
    given = flatten(parsed)
    resolved = resolve(given, preset, {n: _origin(n, v, files) for n, v in given.items()})
    if show:
        print(resolved.describe())
        sys.exit(0)
    found = {group: _own(group, own)} if group else {}
    return replace(resolved, show=samples or 0, plan=cluster or "", **found)


def _own(group: str, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 - of the group's type
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GROUPS[group], nested_key=None)
    return GROUPS[group](**vars(parser.instantiate(parser.parse_object(dict(values)))))


def _meant(message: str) -> str:
    """Return the fields whose names are close to a word of an error message, as a question."""
    known = [name for name, _, _ in leaves(Experiment())]
    last = [name.rpartition(".")[2] for name in known]
    words = [word.lstrip("-") for word in re.findall(r"[\w.-]+", message)]
    near = {n for word in words if word not in known for n in get_close_matches(word, [*known, *last], cutoff=0.8)}
    meant = [name for name, end in zip(known, last, strict=True) if near & {name, end}]
    return f"; did you mean {' or '.join(meant[:4])}?" if meant else ""


def _broken_file(parser: Any, words: Sequence[str]) -> str:  # noqa: ANN401 - jsonargparse is untyped here
    """Return the `--config` file that cannot be read by itself, for the front of a message, or an empty string."""
    after = [following for word, following in pairwise(words) if word == "--config"]
    for path in [*after, *(w.partition("=")[2] for w in words if w.startswith("--config="))]:
        try:
            parser.parse_path(path, defaults=False)
        except (ArgumentError, TypeError, OSError):
            return f"{path}: "
    return ""


def underscored(word: str) -> str:
    """Return `--raw-dir=x-y` as `--raw_dir=x-y`: flags may be written with either; what is no flag stays."""
    return re.sub(r"^--[^=]+", lambda name: "--" + name.group()[2:].replace("-", "_"), word)


def _origin(name: str, value: object, files: Mapping[str, Values]) -> str:
    """Return the last file that sets `name` to `value`, else the flags."""
    found = [source for source, values in files.items() if values.get(name, _UNSET) == value]
    return found[-1] if found else "flag"


_UNSET = object()
