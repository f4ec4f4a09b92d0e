"""`python -m rella`: look at artifacts, remove them, list jobs and presets."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rella.artifacts import MANIFEST, Artifact, list_artifacts
from rella.config import CHOICES, DATASETS, LISTS, MODELS, PRESETS
from rella.errors import ArtifactError, BusyError, RellaError
from rella.leases import holders, is_held
from rella.storage import Storage, resolve_uri

JOBS = {
    "prepare": "raw ratings to users, items, interactions and samples",
    "embed": "item sentences to semantic vectors",
    "retrieve": "for every sample the behaviours closest to its target (SUBR)",
    "reit": "the main job: every missing stage, adapters and Table 3",
    "baseline": "fit a baseline of Table 2, ID- or LM-based, on all training samples or N shots, and score with it",
    "sweep": "Ray Tune over learning rate, batch size and N, or a baseline's settings: the best of each N",
    "report": "tables and figures of the paper, as a page, Markdown, SVG and PDF; runs what is missing",
    "score": "score samples with any base and any adapter or none",
}


def readable_size(size: float) -> str:
    """Return bytes as people write them, e.g. `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def state(artifact: Artifact) -> str:
    """Return `done`, `damaged`, or for work without a manifest `in use` (a lease is held) or `unfinished`."""
    try:
        if artifact.is_complete():
            return "done"
    except ArtifactError:
        return "damaged"
    return "in use" if is_held(artifact) else "unfinished"


def ls(storage: Storage) -> int:
    """Print every artifact with state, rows and size."""
    found = list(list_artifacts(storage))
    width = max((len(a.path) for a in found), default=0)
    total = 0
    for artifact in found:
        now, size = state(artifact), storage.size(artifact.path)
        total += size
        made = f"{artifact.manifest().created}  {artifact.manifest().seconds:>9.1f} s" if now == "done" else ""
        print(f"{artifact.path:<{width}}  {now:<10}  {readable_size(size):>9}  {made}".rstrip())
    print(f"{len(found)} artifacts, {readable_size(total)} in {storage.shown()}")
    return 0


def _chosen(storage: Storage, names: Sequence[str]) -> list[Artifact]:
    """Artifacts whose path or key begins or ends as one of `names` says; an unknown name is an error."""
    found = list(list_artifacts(storage))
    chosen: list[Artifact] = []
    for name in names:
        short = name.removeprefix(storage.uri).strip("/")
        hits = [a for a in found if a.path == short or a.path.startswith(f"{short}/") or a.path.endswith(f"-{short}")]
        if not hits:
            raise ArtifactError(f"no artifact {name!r} in {storage.shown()}: `python -m rella ls` lists them")
        chosen += [a for a in hits if a not in chosen]
    return chosen


def show(storage: Storage, names: Sequence[str], verify: bool) -> int:
    """Print the manifests; with `verify` read every part against its digest."""
    for artifact in _chosen(storage, names):
        print(artifact.storage.read(f"{artifact.path}/{MANIFEST}").decode() if state(artifact) == "done" else "")
        print(f"{artifact.where()}: {state(artifact)}")
        if verify:
            parts = artifact.manifest().parts
            artifact.verify()
            print(f"{artifact.where()}: {len(parts)} parts match their digests")
    return 0


def _refuse_held(artifacts: Sequence[Artifact]) -> None:
    for artifact in artifacts:
        for name in holders(artifact):
            raise BusyError(
                f"{artifact.where()} is being made by another driver ({name}): wait until it has ended, or delete it "
                "all the same with --force"
            )


def clean(storage: Storage, names: Sequence[str], unfinished: bool, yes: bool, force: bool = False) -> int:
    """Delete artifacts after asking; `unfinished` takes all that no manifest vouches for and no driver works on.

    Raises:
        ArtifactError: a name that no artifact has.
        BusyError: a driver works on one of them, and `force` is off.
    """
    chosen = _chosen(storage, names)
    if unfinished:
        left = [a for a in list_artifacts(storage) if state(a) in ("unfinished", "damaged") and not is_held(a)]
        chosen += [a for a in left if a not in chosen]
    if not force:
        _refuse_held(chosen)
    if not chosen:
        print("nothing to delete: name artifacts, or give --unfinished")
        return 0
    for artifact in chosen:
        print(f"{artifact.where()}  {state(artifact)}  {readable_size(storage.size(artifact.path))}")
    if not yes and input(f"Delete these {len(chosen)}? [y/N] ").strip().lower() != "y":
        print("kept")
        return 1
    for artifact in chosen:
        if not force:
            # A driver may have come while the question stood.
            _refuse_held([artifact])
        storage.delete(artifact.path)
    print(f"deleted {len(chosen)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rella", description=__doc__)
    parser.add_argument("--storage", help="folder or URI; default $RELLA_STORAGE, else ~/rella")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list artifacts with state, size and time")
    one = commands.add_parser("show", help="print manifests")
    one.add_argument("names", nargs="+", metavar="ARTIFACT", help="path, its beginning, or the 12 hex digits")
    one.add_argument("--verify", action="store_true", help="read every part and compare its digest")
    away = commands.add_parser("clean", help="delete artifacts")
    away.add_argument("names", nargs="*", metavar="ARTIFACT", help="path, its beginning, or the 12 hex digits")
    away.add_argument("--unfinished", action="store_true", help="all that are unfinished or damaged")
    away.add_argument("--yes", action="store_true", help="do not ask")
    away.add_argument("--force", action="store_true", help="those named even while a driver works on them")
    commands.add_parser("jobs", help="list the scripts in jobs/")
    commands.add_parser("presets", help="list data sets, models, named settings and what the paper varies")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(argv)
    if options.command == "jobs":
        print("\n".join(f"python jobs/{name + '.py':<12} {what}" for name, what in JOBS.items()))
        return 0
    if options.command == "presets":
        named = {"data sets": DATASETS, "models": MODELS, "presets": PRESETS, "lists": LISTS, "choices": CHOICES}
        print(json.dumps(named, indent=1))
        return 0
    try:
        storage = Storage(resolve_uri(options.storage))
        if options.command == "ls":
            return ls(storage)
        if options.command == "show":
            return show(storage, options.names, options.verify)
        return clean(storage, options.names, options.unfinished, options.yes, options.force)
    except (RellaError, OSError, ValueError) as error:
        print(f"rella: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
