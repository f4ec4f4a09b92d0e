"""Table 1 of the paper: what a prepared data set counts, and which of the known facts hold for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rella.config import DataConfig
from rella.data.raw import RawDataset, field_count, field_vocabularies
from rella.data.tables import Tables, column, table1

TABLE1 = ("users", "items", "samples", "fields", "features")
"""The columns of Table 1."""

Facts = Mapping[str, Any]


def dataset_facts(raw: RawDataset, tables: Tables) -> dict[str, Any]:
    """Return the counts of a data set, for its manifest.

    Table 1's five; samples and positives by split (`train`, `train_positives`, ...); `ratings`; `longest_history`;
    `vocabularies` by field, whose sum is `features`; `field_columns`: where each field is; `dropped` rows by reason;
    `profile`: by field its values, None where there are many; `item_fields`.
    """
    vocabularies = field_vocabularies(raw)
    positive = tables.samples.filter(pc.equal(tables.samples.column("label"), 1))
    by_split = {c["values"]: c["counts"] for c in pc.value_counts(positive.column("split")).to_pylist()}
    counts = table1(tables)
    return {
        **counts,
        **{f"{split}_positives": int(by_split.get(split, 0)) for split in ("train", "valid", "test")},
        "fields": field_count(raw),
        "features": sum(vocabularies.values()),
        "ratings": len(raw.rating),
        "longest_history": int(np.max(column(tables.users, "count"), initial=0)),
        "vocabularies": vocabularies,
        "field_columns": dict(raw.fields),
        "dropped": dict(raw.dropped),
        "profile": {name: _few_values(raw.users.column(name)) for name in raw.users.schema.names if name not in _OWN},
        "item_fields": [name for name in raw.items.schema.names if name not in _OWN],
    }


_OWN = ("user", "user_id", "item")
_FEW = 100


def _few_values(column: pa.ChunkedArray) -> list[str] | None:
    values = column.unique()
    return sorted(values.to_pylist()) if len(values) <= _FEW else None


PAPER: dict[str, Facts] = {
    "ml-1m": {
        "users": 6040,
        "items": 3706,
        "samples": 970_009,
        "fields": 10,
        "features": 16_944,
        "ratings": 1_000_209,
        "train": 776_007,
        "valid": 97_000,
        "test": 97_002,
        "vocabularies": {
            "User ID": 6040,
            "Gender": 2,
            "Age": 7,
            "Job": 21,
            "Zipcode": 3439,
            "Movie ID": 3706,
            "Movie title": 3706,
            "Movie genre": 18,
            "Rating": 5,
        },
    },
    "ml-25m": {
        "users": 162_541,
        "items": 59_047,
        "samples": 24_187_390,
        "fields": 6,
        "features": 280_576,
        "ratings": 25_000_095,
        "train": 19_349_912,
        "vocabularies": {"User ID": 162_541, "Movie ID": 59_047, "Rating": 10},
    },
    "bookcrossing": {
        "users": 278_858,
        "items": 271_375,
        "samples": 17_714,
        "fields": 10,
        "features": 912_279,
        "train": 14_348,
        "valid": 1_594,
        "test": 1_772,
        "vocabularies": {
            "User ID": 278_858,
            "Location": 922,
            "Age": 11,
            "ISBN": 271_375,
            "Book title": 242_152,
            "Author": 102_027,
            "Publication year": 116,
            "Publisher": 16_807,
            "Rating": 11,
        },
    },
}
"""The paper's Table 1 and what its authors' code prints. For MovieLens-25M the table says 25,000,095 samples, which is
the number of ratings; 24,187,390 are left by the filter, and N = 19,349,912 (§4.2) is 0.8 of them. BookCrossing's
15,942 training samples are `train` and `valid` here."""


@dataclass(frozen=True)
class Check:
    """One known fact and what was found."""

    name: str
    expected: int
    found: int

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return self.expected == self.found


def _flat(facts: Facts) -> dict[str, int]:
    counts = {name: value for name, value in facts.items() if isinstance(value, int)}
    return counts | {f"{name} values": size for name, size in facts.get("vocabularies", {}).items()}


def checks(dataset: str, facts: Facts, rules: DataConfig, usual: DataConfig) -> list[Check]:
    """Return the known facts of a data set beside what was found; none for others.

    Args:
        dataset: its name.
        facts: from `dataset_facts`.
        rules: how it was prepared.
        usual: the data set's default rules; where they differ, counts of samples are not compared.
    """
    samples = {"samples", "train", "valid", "test"}
    names = ("min_history", "order", "targets", "split_by", "split", "strict")
    same = all(getattr(rules, n) == getattr(usual, n) for n in names)
    found = _flat(facts)
    expected = _flat(PAPER.get(dataset, {}))
    return [Check(n, value, found[n]) for n, value in expected.items() if same or n not in samples]


def table1_text(dataset: str, facts: Facts, known: list[Check]) -> str:
    """Return the data set's row of Table 1, the paper's below it, and which other facts hold or do not."""
    rows = [["Dataset", *(f"#{name.capitalize()}" for name in TABLE1)]]
    rows.append([dataset, *(f"{facts[name]:,}" for name in TABLE1)])
    expected = {check.name: check.expected for check in known}
    if known:
        rows.append(["the paper's", *(f"{expected[n]:,}" if n in expected else "-" for n in TABLE1)])
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(w) if c == 0 else text.rjust(w) for c, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    sizes = ", ".join(f"{name} {size:,}" for name, size in facts["vocabularies"].items())
    lines += [f"features: {sizes}"]
    lines += [f"left out: {count:,} {reason}" for reason, count in facts["dropped"].items()]
    wrong = [check for check in known if not check.holds]
    if known:
        lines.append(
            f"{len(known) - len(wrong)} of {len(known)} facts of the paper's data hold" + (":" if wrong else "")
        )
        right = ", ".join(check.name for check in known if check.holds)
        if wrong:
            lines.append(f"  hold: {right or 'none'}")
            lines += [f"  differs: {check.name} {check.found:,}, the paper's {check.expected:,}" for check in wrong]
    return "\n".join(lines)
