"""From MovieLens-1M's original files to samples: jobs/prepare.py against the loop over rows that notebooks run.

    python benchmarks/prepare.py --raw-dir DIR [--quick] [--rows N] [--json FILE]

Both are processes of their own, one after the other; time includes their start, memory is the peak sum of PSS over the
process tree. The loop is what a user would otherwise write and what the paper's notebooks do: pandas, one row at a
time, every sample with a copy of its whole history.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.processes import measure


def loop(raw_dir: Path, rows: int | None) -> dict[str, int]:
    """Prepare MovieLens-1M row by row and return the sizes of the splits."""
    import pandas as pd

    names = ["user", "movie", "rating", "time"]
    ratings = pd.read_csv(raw_dir / "ratings.dat", sep="::", engine="python", names=names, nrows=rows)
    ratings = ratings.sort_values(["time", "user", "movie"], kind="stable").reset_index(drop=True)
    seen: dict[int, list[int]] = {}
    stars: dict[int, list[int]] = {}
    histories, rated = [], []
    for _, row in ratings.iterrows():
        user = int(row["user"])
        histories.append(seen.setdefault(user, []).copy())
        rated.append(stars.setdefault(user, []).copy())
        seen[user].append(int(row["movie"]))
        stars[user].append(int(row["rating"]))
    ratings["history"], ratings["history rating"] = histories, rated
    ratings["label"] = ratings["rating"].apply(lambda r: int(r > 3))
    samples = ratings[ratings["history"].apply(len) >= 5].reset_index(drop=True)
    train, valid = int(0.8 * len(samples)), int(0.1 * len(samples))
    return {"samples": len(samples), "train": train, "valid": valid, "test": len(samples) - train - valid}


def main() -> None:
    """Measure both and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--raw-dir", type=Path, required=True, help="folder with MovieLens-1M's original files")
    parser.add_argument("--rows", type=int, help="let the loop read the first N ratings only (ours reads all)")
    parser.add_argument("--quick", action="store_true", help="under a minute: the loop reads 100,000 ratings")
    parser.add_argument("--json", type=Path, help="write the figures there, flat")
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        print(json.dumps(loop(options.raw_dir, options.rows)))
        return
    rows = options.rows or (100_000 if options.quick else None)
    raw = str(options.raw_dir.resolve())
    with tempfile.TemporaryDirectory() as storage:
        job = [sys.executable, "jobs/prepare.py", "--dataset", "ml-1m", "--raw-dir", raw, "--storage", storage]
        ours = measure(job)
    words = [sys.executable, __file__, "--raw-dir", raw, "--loop"]
    other = measure(words + (["--rows", str(rows)] if rows else []))
    found, expected = json.loads(ours.last), json.loads(other.last)
    if not rows and any(found[name] != size for name, size in expected.items()):
        sys.exit(f"the two disagree: {found} and {expected}")
    for name, one in (("jobs/prepare.py", ours), ("loop over rows", other)):
        print(f"{name:<16} {one.seconds:8.1f} s  {one.pss / 1e9:6.2f} GB")
    figures = {
        "seconds": ours.seconds,
        "pss": ours.pss,
        "rows_of_the_loop": float(rows or found["samples"]),
        "ratio_loop": other.seconds / ours.seconds,
        "memory_ratio_loop": other.pss / ours.pss,
    }
    print(f"ratio            {figures['ratio_loop']:8.1f} ×  {figures['memory_ratio_loop']:6.1f} ×")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
