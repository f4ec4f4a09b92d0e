"""One pyarrow schema per table of every artifact; `check` names the column that breaks it."""

from __future__ import annotations

import pyarrow as pa

from rella.errors import InputError

SPLITS = ("train", "valid", "test")
"""The values of a sample's `split`."""

USERS = pa.schema(
    [
        pa.field("user", pa.int32(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("count", pa.int32(), nullable=False),
    ]
)
"""Row number = `user`. `interactions[offset : offset + count]` are the user's, oldest first. More columns: the profile
fields as the text that prompts show."""

ITEMS = pa.schema(
    [
        pa.field("item", pa.int32(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
    ]
)
"""Row number = `item`. More columns: the descriptive fields (for movies `genre`, the first listed, and `genres`)."""

INTERACTIONS = pa.schema(
    [
        pa.field("item", pa.int32(), nullable=False),
        pa.field("rating", pa.float32(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
    ]
)
"""All users' behaviours, by user, then oldest first."""

SAMPLES = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("user", pa.int32(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("label", pa.int8(), nullable=True),
        pa.field("split", pa.string(), nullable=False),
    ]
)
"""The sample's history is `interactions[offset[user] : offset[user] + end]`; ascending by `sample_id`."""

POOLED = pa.schema(
    [pa.field("item", pa.int32(), nullable=False), pa.field("vector", pa.list_(pa.float32()), nullable=False)]
)
"""Item vectors: u_t of §3.2, the mean of the last hidden states, and v_t, its PCA projection."""

SCORES = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("label", pa.int8(), nullable=True),
        pa.field("logit_yes", pa.float32(), nullable=False),
        pa.field("logit_no", pa.float32(), nullable=False),
        pa.field("probability", pa.float64(), nullable=False),
    ]
)
"""ŷ of Eq. 2 with the two logits it is made of; ascending by `sample_id`."""


def neighbours(position_type: pa.DataType) -> pa.Schema:
    """Return the schema of the neighbours table for positions of `position_type` (uint8, uint16 or int32).

    `positions` are indices into the sample's own history, most similar first, at most `k_max` of them; the top K for a
    smaller K is a prefix.
    """
    return pa.schema(
        [
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("positions", pa.list_(position_type), nullable=False),
        ]
    )


def position_type(longest_history: int) -> pa.DataType:
    """Return the smallest integer type that holds every position of a history of `longest_history` behaviours."""
    for bits, kind in ((8, pa.uint8()), (16, pa.uint16())):
        if longest_history <= 2**bits:
            return kind
    return pa.int32()


def check(table: pa.Table, schema: pa.Schema, where: str) -> None:
    """Verify that `table` has `schema`'s columns and types and no nulls where none may be; more columns are allowed.

    Raises:
        InputError: names `where` and the column that is missing, mistyped or null.
    """
    for field in schema:
        if field.name not in table.schema.names:
            raise InputError(f"{where}: column {field.name!r} is missing (found {table.schema.names})")
        column = table.column(field.name)
        if not _same_type(column.type, field.type):
            raise InputError(f"{where}: column {field.name!r} is {column.type}, expected {field.type}")
        if not field.nullable and column.null_count:
            raise InputError(f"{where}: column {field.name!r} has {column.null_count} null values")


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(wanted) and (pa.types.is_list(found) or pa.types.is_fixed_size_list(found)):
        return bool(found.value_type == wanted.value_type)
    return bool(found == wanted)
