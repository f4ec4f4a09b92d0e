"""The connection to Ray."""

from __future__ import annotations

from typing import NoReturn

import pytest

from rella.config import ClusterConfig
from rella.dist import session
from rella.errors import ClusterError


def test_a_cluster_that_does_not_answer_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> NoReturn:
        assert "address" not in options  # RAY_ADDRESS says where.
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", refuse)
    told = r"(?s)10\.0\.0\.1:6379.*RAY_AUTH_MODE=token.*unset RAY_ADDRESS"
    with pytest.raises(ClusterError, match=told), session.session(ClusterConfig()):
        pass
