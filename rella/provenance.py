"""What made an artifact: the code and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rella.artifacts import Json


def code_version() -> dict[str, Json]:
    """Return the version of the package, the commit where there is a checkout, and the main libraries' versions."""
    libraries = {}
    for name in ("ray", "torch", "transformers", "peft", "deepspeed", "numpy", "pyarrow", "scikit-learn"):
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    from rella import __version__

    return {"rella": __version__, "commit": _commit(), "libraries": libraries}


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Json]:
    """Return where this process runs: host, system, cores, Python."""
    return {
        "host": platform.node(),
        "system": platform.platform(terse=True),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
