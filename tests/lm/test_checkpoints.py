"""Checkpoint files: everything comes back, the newest whole one is taken, nothing foreign or damaged ever is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rella.artifacts import Artifact
from rella.lm.checkpoints import FOLDER, KEPT, Checkpoints, Course, TrainingState
from rella.lm.zero import OptimiserState
from rella.storage import Storage

KEY = "ab" * 32


def state_at(step: int, key: str = "a") -> TrainingState:
    generator = torch.Generator().manual_seed(step)

    def tensors() -> dict[str, torch.Tensor]:
        return {"lora_A": torch.randn(3, 4, generator=generator), "lora_B": torch.randn(4, 3, generator=generator)}

    course = Course([1.0 / 3] * step, [{"auc": 0.1 + 0.2, "step": step}], step, 7 * step, [2])
    optimiser = OptimiserState(tensors(), {"exp_avg": tensors(), "exp_avg_sq": tensors()}, step, {"cur_scale": 2.0**14})
    best = {n: t.to(torch.bfloat16) for n, t in tensors().items()}
    return TrainingState(course, optimiser, best)


def same(a: TrainingState, b: TrainingState) -> bool:
    pairs = [(a.best, b.best), (a.optimiser.weights, b.optimiser.weights)]
    pairs += [(a.optimiser.moments[m], b.optimiser.moments[m]) for m in ("exp_avg", "exp_avg_sq")]
    return (
        a.course == b.course
        and (a.optimiser.steps, a.optimiser.scale) == (b.optimiser.steps, b.optimiser.scale)
        and all(x.keys() == y.keys() for x, y in pairs)
        and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for x, y in pairs for n in x)
    )


@pytest.fixture
def states(tmp_path: Path) -> Checkpoints:
    return Checkpoints(Artifact(Storage(str(tmp_path)), f"d/reit/x-{KEY[:12]}", KEY))


def files(states: Checkpoints) -> list[Path]:
    return sorted(Path(states.artifact.storage.absolute(f"{states.artifact.path}/{FOLDER}")).iterdir())


def newest(states: Checkpoints) -> TrainingState | None:
    name = states.newest()
    return None if name is None else states.load(name)


def test_everything_comes_back(states: Checkpoints) -> None:
    assert states.newest() is None
    states.save(state_at(5))
    found = newest(states)
    assert found is not None
    assert same(found, state_at(5))
    assert not same(found, state_at(6))


def test_a_file_is_plain_safetensors(states: Checkpoints) -> None:
    states.save(state_at(5))
    with safe_open(files(states)[0], "pt") as file:
        assert set(file.keys()) == {
            f"{g}/{n}" for g in ("weights", "exp_avg", "exp_avg_sq", "best") for n in ("lora_A", "lora_B")
        }


def test_the_newest_is_taken_and_few_are_kept(states: Checkpoints) -> None:
    for step in (9, 10, 11, 100):
        states.save(state_at(step))
    assert len(files(states)) == KEPT
    found = newest(states)
    assert found is not None
    assert found.course.steps == 100
    states.clear()
    assert states.newest() is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "name"])
def test_a_damaged_one_is_passed_over(damage: str, states: Checkpoints) -> None:
    states.save(state_at(1))
    states.save(state_at(2))
    file = files(states)[-1]
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    elif damage == "cut":
        content = content[:-7]
    elif damage == "empty":
        content = bytearray()
    file.write_bytes(content)
    if damage == "name":
        file.rename(file.with_name(f"step-00000009-{'0' * 16}.safetensors"))
    found = newest(states)
    assert found is not None
    assert found.course.steps == 1
    files(states)[0].unlink()
    assert newest(states) is None


def test_another_artifact_s_is_not_taken(states: Checkpoints) -> None:
    """The folder's name holds 12 digits of the key; the file holds all of them."""
    other = Checkpoints(Artifact(states.artifact.storage, states.artifact.path, KEY[:12] + "0" * 52))
    other.save(state_at(3))
    assert other.newest() is not None
    assert states.newest() is None


def test_the_room_that_is_asked_for_is_enough(states: Checkpoints) -> None:
    model = torch.nn.Linear(40, 30)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    copies = [{n: p.clone() for n, p in weights.items()} for _ in range(3)]
    optimiser = OptimiserState(weights, {"exp_avg": copies[0], "exp_avg_sq": copies[1]}, 1)
    for step in range(1, KEPT + 2):
        states.save(TrainingState(Course([0.5] * step), optimiser, copies[2]))
    taken = sum(len(file.read_bytes()) for file in files(states))
    assert taken < states.space(model) < 2 * taken
