"""The import graph: what may use what, what an import costs, and that importing does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import rella

PACKAGE = Path(rella.__file__).resolve().parent
JOBS = PACKAGE.parent / "jobs"

CORE = {
    "errors",
    "config",
    "stages",
    "baselines",
    "baseline_pipeline",
    "cli",
    "schemas",
    "storage",
    "storage_errors",
    "artifacts",
    "provenance",
    "leases",
    "digests",
    "models",
    "model_store",
    "backbones",
    "wording",
    "dataset_file",
    "pipeline",
    "plan",
    "plan_text",
    "shapes",
    "hardware",
    "metrics",
    "progress",
    "sweep",
    "sweep_config",
    "report_config",
    "tracking",
}
"""Knows nothing of data, prompts or models' insides."""
METHOD = {"data", "prompts", "pca", "retrieval", "paper"}
ON_CARDS = {"rella.retrieval.device"}
"""Modules of the method that are torch's; nothing of the method imports them."""
LIBRARIES = {"lm", "ctr", "textctr", "analysis"}
"""torch, transformers, peft, deepspeed: one process, no Ray."""
MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(CORE, CORE),
    **dict.fromkeys(METHOD, CORE | METHOD),
    **dict.fromkeys(LIBRARIES, CORE | METHOD | LIBRARIES),
    "report": CORE | METHOD | {"report"},
    "dist": CORE | METHOD | LIBRARIES | {"report", "dist"},
    "__main__": CORE,
    "__init__": set(),
}
"""Part of the package → the parts it may import, lazily or not. A new part must be put in its place here."""
HEAVY = {"torch", "transformers", "peft", "deepspeed", "accelerate", "bitsandbytes", "safetensors", "tokenizers"}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts)


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            assert node.module is not None
            yield node.module
            # `from rella.x import y` may mean the module rella.x.y.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (n for n in names if (PACKAGE.parent / n.replace(".", "/")).with_suffix(".py").exists())


def part(name: str) -> str:
    """rella.lm.tuning → lm; rella itself → __init__."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent, check=False)


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_only_point_up_the_module_map(path: Path) -> None:
    own = part(dotted(path))
    assert own in MAY_IMPORT, f"{own} has no place in the module map: give it one in this test"
    used = {part(name) for name in imports(path) if name.split(".")[0] == "rella" and name != "rella"}
    assert used <= MAY_IMPORT[own]


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_only_the_right_layers_use_ray_and_torch(path: Path) -> None:
    own, used = part(dotted(path)), {name.split(".")[0] for name in imports(path)}
    if own != "dist":
        assert "ray" not in used
    if own not in LIBRARIES | {"dist"} and dotted(path) not in ON_CARDS:
        assert not used & HEAVY
        assert not ON_CARDS & set(imports(path))


def test_no_module_imports_itself_through_others() -> None:
    graph = {dotted(p): {n for n in imports(p) if n.startswith("rella.")} for p in modules()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join((*above, name))
        if name not in done:
            for other in graph.get(name, ()):
                if other != name:
                    visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_importing_does_nothing(path: Path) -> None:
    """No call stands alone at module level: no print, no setting of anything global."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{path.name}:{node.lineno} does something when imported"


def test_importing_the_package_is_cheap_and_offline() -> None:
    done = run(
        """
        import socket, sys, time

        def refuse(*args, **kwargs):
            raise RuntimeError("importing opens a connection")

        socket.socket.connect = socket.getaddrinfo = refuse
        start = time.perf_counter()
        import rella
        assert time.perf_counter() - start < 0.5
        heavy = {"numpy", "pyarrow", "torch", "ray", "transformers", "jsonargparse"} & set(sys.modules)
        assert not heavy, heavy
        print(rella.__version__)
        """
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == (rella.__version__, "", 0)


def test_the_pure_layers_work_without_torch_and_ray() -> None:
    names = [
        name
        for name in map(dotted, modules())
        if part(name) in CORE | METHOD | {"report"} and not name.endswith(".__init__") and name not in ON_CARDS
    ]
    assert {"rella.pipeline", "rella.data.questions", "rella.retrieval.blocks", "rella.report.tables"} <= set(names)
    done = run(
        f"""
        import socket, sys

        def refuse(*args, **kwargs):
            raise RuntimeError("importing opens a connection")

        socket.socket.connect = socket.getaddrinfo = refuse

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {sorted(HEAVY | {"ray"})!r}:
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Missing())
        import importlib

        for name in {names!r}:
            importlib.import_module(name)
        heavy = {sorted(HEAVY | {"ray"})!r}
        assert not set(heavy) & set(sys.modules)
        """
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


JOB_FILES = sorted(JOBS.glob("*.py"))


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda p: p.name)
def test_a_job_is_one_call(path: Path) -> None:
    text = path.read_text()
    assert set(imports(path)) <= {"__future__", "sys", "rella.dist.jobs"}
    assert len(text.splitlines()) <= 90
    assert 'if __name__ == "__main__":' in text
    assert ast.get_docstring(ast.parse(text))


def test_the_jobs_names_hide_no_library() -> None:
    """`python jobs/x.py` puts `jobs/` first on the path: a job named like a module would be imported in its place."""
    names = {p.stem for p in JOB_FILES}
    assert {"prepare", "embed", "retrieve", "reit", "score"} <= names
    assert not names & ({"evaluate", "datasets", "tokenize", "profile", "ray"} | sys.stdlib_module_names)
