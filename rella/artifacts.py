"""Artifacts: keys, parts, manifests. A stage writes immutable parts; the manifest comes last and makes them readable.

The key is a digest of everything that changes the result, so the same work is found again from any machine, and work
that was cut off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rella.errors import ArtifactError
from rella.storage import Storage

FORMAT = 1
MANIFEST = "manifest.json"
INTENT = "stage.json"
"""What an unfinished folder is going to hold: key and configuration."""
LEASES = "lease"
"""Where drivers say that they are at work; not part of an artifact."""
_PART = re.compile(r"part-(\d{5})-of-(\d{5})\.parquet$")
_SEAL = b"rella-sha256:"
_NO_SEAL = _SEAL + b"0" * 64

Json = Any
"""What `json` reads and writes."""


def canonical_json(value: Json) -> str:
    """Return the one JSON text of `value`: sorted keys, no blanks, UTF-8, no NaN.

    Raises:
        ValueError: NaN or infinity.
        TypeError: something JSON does not know.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Json) -> str:
    """Return the SHA-256 of `value`'s canonical JSON as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Layout:
    """How a Parquet part is laid out; it holds the same in any."""

    compression: str = "zstd"
    row_group_rows: int | None = None
    """Rows that can be read without the others; None for Parquet's default."""
    encodings: Mapping[str, str] = field(default_factory=dict)
    """Column → encoding, for all columns or for none."""


@dataclass(frozen=True)
class Part:
    """One immutable file of an artifact as its manifest lists it."""

    name: str
    """Path below the artifact's folder."""
    rows: int
    """Rows of a Parquet part; 0 for other files."""
    bytes: int
    sha256: str
    facts: Mapping[str, Json] = field(default_factory=dict)
    """Counts that the part's maker wants summed up in the manifest, e.g. truncated prompts."""


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from and how; it comes last and makes the parts readable."""

    stage: str
    version: int
    key: str
    dataset: str
    config: Mapping[str, Json]
    inputs: Mapping[str, str]
    """Input name → path of the artifact below the storage."""
    identity: Mapping[str, Json]
    """Digests of raw files and the resolved model, where the stage has them."""
    parts: Sequence[Part]
    facts: Mapping[str, Json] = field(default_factory=dict)
    """The stage's own figures: counts, losses, the chosen epoch."""
    settings: Mapping[str, Json] = field(default_factory=dict)
    """What does not change the result: workers, batch sizes, storage."""
    seconds: float = 0.0
    created: str = ""
    code: Mapping[str, Json] = field(default_factory=dict)
    machine: Mapping[str, Json] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Rows over all parts of the main table."""
        return sum(p.rows for p in self.parts)

    def to_bytes(self) -> bytes:
        """Return the file's content: readable JSON that ends with a checksum of the rest."""
        body = asdict(self)
        return (json.dumps(body | {"checksum": digest(body)}, indent=1, ensure_ascii=False) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> Manifest:
        """Parse a manifest file.

        Raises:
            ArtifactError: not JSON, a wrong checksum, or of another format.
        """
        remedy = f"start the job again with --restart {_stage_of(where)}"
        try:
            body = json.loads(data)
            checksum = body.pop("checksum")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{where} is not a manifest ({error}): {remedy}") from error
        if digest(body) != checksum:
            raise ArtifactError(f"{where} does not match its checksum, it was damaged or edited: {remedy}")
        if body["format"] != FORMAT:
            raise ArtifactError(f"{where} has format {body['format']}, this version reads {FORMAT}: {remedy}")
        return Manifest(**{**body, "parts": [Part(**p) for p in body["parts"]]})


@dataclass(frozen=True)
class Artifact:
    """A folder of the storage that holds, or will hold, one stage's result."""

    storage: Storage
    path: str
    key: str = ""
    """64 hex digits; empty where the artifact was opened by its path alone."""

    @property
    def stage(self) -> str:
        """The stage that makes it, from its place `<dataset>/<stage>/<slug>`."""
        return _stage_of(f"{self.path}/")

    def where(self, name: str = "") -> str:
        """Return the artifact (or a file of it) as a user would type it."""
        return self.storage.shown(f"{self.path}/{name}" if name else self.path)

    @cached_property
    def _manifest_file(self) -> str:
        return f"{self.path}/{MANIFEST}"

    def is_complete(self) -> bool:
        """Return whether the manifest is there, readable and of this key.

        Raises:
            ArtifactError: there is a manifest, but a damaged one or another key's.
        """
        if not self.storage.exists(self._manifest_file):
            return False
        self.manifest()
        return True

    def manifest(self) -> Manifest:
        """Return the manifest.

        Raises:
            ArtifactError: the artifact is missing, unfinished, damaged or of another key.
        """
        if not self.storage.exists(self._manifest_file):
            state = "unfinished (no manifest)" if self.storage.exists(self.path) else "missing"
            raise ArtifactError(f"artifact {self.where()} is {state}: run the job that makes it")
        found = Manifest.from_bytes(self.storage.read(self._manifest_file), self.where(MANIFEST))
        if self.key and found.key != self.key:
            raise ArtifactError(f"{self.where(MANIFEST)} is of key {found.key[:12]}, expected {self.key[:12]}")
        return found

    def part_name(self, shard: int, shards: int, table: str = "") -> str:
        """Return the path of a part below the artifact; a stage with several tables names each."""
        return f"parts/{table + '/' if table else ''}part-{shard:05d}-of-{shards:05d}.parquet"

    def write_part(
        self,
        data: pa.Table,
        shard: int,
        shards: int,
        table: str = "",
        facts: Mapping[str, Json] | None = None,
        layout: Layout | None = None,
    ) -> Part:
        """Write one Parquet part atomically, stamped with the key and sealed with its own digest; return its entry."""
        how = layout or Layout()
        stamp = {"rella.key": self.key, "rella.rows": str(data.num_rows), "rella.facts": canonical_json(facts or {})}
        stamped = data.replace_schema_metadata({**stamp, "rella.seal": _NO_SEAL.decode()})
        sink = pa.BufferOutputStream()
        pq.write_table(
            stamped,
            sink,
            compression=how.compression,
            write_page_checksum=True,
            row_group_size=how.row_group_rows,
            use_dictionary=not how.encodings,
            column_encoding=dict(how.encodings) or None,
        )
        part = self.write_file(self.part_name(shard, shards, table), _sealed(sink.getvalue()))
        return replace(part, rows=data.num_rows, facts=dict(facts or {}))

    def write_file(self, name: str, data: bytes | bytearray) -> Part:
        """Write one file below the artifact atomically and return its entry for the manifest.

        One that is there and holds the same already, as a killed run may have left it, is not written again.
        """
        path = f"{self.path}/{name}"
        there = self.storage.exists(path) and self.storage.size(path) == len(data)
        if not (there and self.storage.read(path) == data):
            self.storage.write(path, data)
        return Part(name, 0, len(data), hashlib.sha256(data).hexdigest())

    def good_part(self, shard: int, shards: int, table: str = "") -> Part | None:
        """Return the entry of a part that an earlier, unfinished run left whole, else None.

        The seal covers every byte, and the stamp must be this artifact's key: a truncated, flipped or foreign part is
        made again.
        """
        name = self.part_name(shard, shards, table)
        if not self.storage.exists(f"{self.path}/{name}"):
            return None
        data = self.storage.read(f"{self.path}/{name}")
        if not _is_sealed(data):
            return None
        found = pq.read_table(io.BytesIO(data))
        stamp = found.schema.metadata or {}
        if stamp.get(b"rella.key") != self.key.encode() or stamp.get(b"rella.rows") != str(found.num_rows).encode():
            return None
        facts = json.loads(stamp.get(b"rella.facts", b"{}"))
        return Part(name, found.num_rows, len(data), hashlib.sha256(data).hexdigest(), facts)

    def is_vouched_for(self) -> bool:
        """Return whether there is a manifest that can be read; a damaged one vouches for nothing."""
        try:
            return self.is_complete()
        except ArtifactError:
            return False

    def begin(self, config: Mapping[str, Json]) -> None:
        """Say what this folder is going to hold, before its first part.

        Raises:
            ArtifactError: it is unfinished work of another configuration; names what differs.
        """
        file = f"{self.path}/{INTENT}"
        found: Json = None
        if self.storage.exists(file):
            try:
                found = json.loads(self.storage.read(file))
            except ValueError:
                found = None  # Damaged: written anew.
        if isinstance(found, dict) and found.get("key", self.key) != self.key:
            ours, theirs = json.loads(canonical_json(dict(config))), found.get("config", {})
            odd = [n for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)]
            what = ", ".join(f"{n} {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in odd[:5])
            raise ArtifactError(
                f"{self.where()} is unfinished work of another configuration ({what or 'other inputs'}): "
                f"move it away, or delete it with `python -m rella clean {self.path}`"
            )
        self.write_file(INTENT, (canonical_json({"key": self.key, "config": dict(config)}) + "\n").encode())

    def clear(self) -> None:
        """Delete everything but the leases; the manifest first, so that no half-deleted artifact can be read."""
        self.storage.delete(self._manifest_file)
        for path in self.storage.list(self.path):
            if path != f"{self.path}/{LEASES}":
                self.storage.delete(path)

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the manifest, which makes the artifact readable, and drop what it does not list."""
        self.storage.write(self._manifest_file, manifest.to_bytes())
        self.tidy(manifest)
        return manifest

    def tidy(self, manifest: Manifest) -> None:
        """Delete files that the manifest of a finished artifact does not list: checkpoints, parts of other cuts."""
        listed = {f"{self.path}/{p.name}" for p in manifest.parts} | {self._manifest_file}
        for path in self.storage.list(self.path, recursive=True):
            if path not in listed and not path.startswith(f"{self.path}/{LEASES}/"):
                self.storage.delete(path)
        self.storage.sweep(self.path, 0.0)

    def read(self, table: str = "", columns: Sequence[str] | None = None) -> pa.Table:
        """Return one table of a finished artifact, its parts in shard order.

        Raises:
            ArtifactError: unfinished, or a part that is missing or does not match the manifest; names the part.
        """
        parts = [p for p in self.manifest().parts if self._is_part_of(p.name, table)]
        if not parts:
            raise ArtifactError(f"artifact {self.where()} has no table {table!r}")
        return pa.concat_tables(self._read_part(p, columns) for p in sorted(parts, key=lambda p: p.name))

    def _is_part_of(self, name: str, table: str) -> bool:
        return bool(_PART.search(name)) and name.removeprefix("parts/").rpartition("/")[0] == table

    def _read_part(self, part: Part, columns: Sequence[str] | None) -> pa.Table:
        columns = None if columns is None else list(columns)
        return pq.read_table(io.BytesIO(self.checked(part)), columns=columns)

    def checked(self, part: Part) -> bytes:
        """Return a part's bytes, proven to be those that its entry describes.

        Raises:
            ArtifactError: it is missing or differs; names the part and the remedy.
        """
        damaged = f"part {self.where(part.name)} {{}}: put it back, or start the job again with --restart {self.stage}"
        try:
            data = self.storage.read(f"{self.path}/{part.name}")
        except FileNotFoundError as error:
            raise ArtifactError(damaged.format("is missing")) from error
        if len(data) != part.bytes or hashlib.sha256(data).hexdigest() != part.sha256:
            raise ArtifactError(damaged.format("does not match the digest in the manifest")) from None
        return data

    def verify(self) -> None:
        """Read every part and compare it with the manifest.

        Raises:
            ArtifactError: names the first part that is missing or does not match.
        """
        for part in self.manifest().parts:
            self.checked(part)

    def local_folder(self, name: str) -> Path:
        """Return a folder of this machine with the files below `name` of a finished artifact (an adapter, say).

        Raises:
            ArtifactError: unfinished, or a file that does not match the manifest.
        """
        folder = self.storage.local_copy(f"{self.path}/{name}")
        for part in self.manifest().parts:
            if part.name.startswith(f"{name}/"):
                file = folder / part.name.removeprefix(f"{name}/")
                if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != part.sha256:
                    raise ArtifactError(
                        f"{self.where(part.name)} is missing or does not match the manifest: put it back, or start the "
                        f"job again with --restart {self.stage}"
                    )
        return folder


def _stage_of(where: str) -> str:
    """The stage of a place or file `…/<stage>/<slug>-<12 hex>/…`, else `all`."""
    found = re.search(r"([a-z]+)/[^/]*-[0-9a-f]{12}/", where)
    return found[1] if found else "all"


def _sealed(data: pa.Buffer) -> bytearray:
    """Return a Parquet file with the digest that it has with an empty seal in its seal; the length stays."""
    body = bytearray(data)
    at = body.rfind(_NO_SEAL)
    if at < 0:
        raise RuntimeError("the Parquet writer left no room for the seal")
    seal = _SEAL + hashlib.sha256(body).hexdigest().encode()
    body[at : at + len(seal)] = seal
    return body


def _is_sealed(data: bytes) -> bool:
    """Whether a Parquet file holds what it held when it was sealed; checksums of pages would miss its footer."""
    before, mark, after = data.rpartition(_SEAL)
    if not mark or len(after) < 64:
        return False
    return after[:64] == hashlib.sha256(before + _NO_SEAL + after[64:]).hexdigest().encode()


def list_artifacts(storage: Storage) -> Iterable[Artifact]:
    """Yield every artifact folder below `storage` (`<dataset>/<stage>/<slug>-<12 hex>`), finished or not."""
    for dataset in storage.list(""):
        for stage in storage.list(dataset):
            for path in storage.list(stage):
                if re.search(r"-[0-9a-f]{12}$", path):
                    yield Artifact(storage, path)


def summed(parts: Sequence[Part]) -> dict[str, Json]:
    """Return the parts' facts added up by name."""
    total: dict[str, Json] = {}
    for part in parts:
        for name, value in part.facts.items():
            total[name] = total.get(name, 0) + value
    return total


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
