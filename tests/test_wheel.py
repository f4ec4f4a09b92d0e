"""The wheel builds and imports alone, and it carries the stand-in model."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_builds_and_imports_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "rella").symlink_to(ROOT / "rella")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("rella-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"rella/py.typed", "rella/assets/tiny/model.safetensors", "rella/assets/tiny/tokenizer.json"} <= set(names)
    assert not [n for n in names if n.startswith(("jobs/", "tests/"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # -S: no site-packages, so nothing but the standard library and the wheel.
    alone = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import rella; print(rella.__file__)"
    shown = subprocess.run(
        [sys.executable, "-S", "-c", alone], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert str(tmp_path / "site") in shown.stdout
