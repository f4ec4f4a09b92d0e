"""A report's numbers as JSON: what a script or another page reads."""

from __future__ import annotations

from dataclasses import asdict

from rella.artifacts import Json
from rella.report.contents import Block, Report, Table


def as_json(report: Report) -> dict[str, Json]:
    """Return everything that the page shows, by block."""
    return {
        "title": report.title,
        "facts": dict(report.facts),
        "blocks": {block.name: _block(block) for block in report.blocks},
        "artifacts": dict(report.artifacts),
    }


def _block(block: Block) -> dict[str, Json]:
    found: dict[str, Json] = asdict(block)
    if isinstance(block, Table):
        # By group and row, as people look things up.
        found["rows"] = [{"group": r["group"], "title": r["title"], **r["cells"]} for r in found["rows"]]
    return found
