"""What `auto` stands for: the cards are asked on their nodes."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
import ray
from rella.config import ClusterConfig
from rella.dist import precision

ray.init(num_cpus=1, num_gpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False, address="local")
print(precision.best_precision(ClusterConfig()))
if sys.argv[1] == "1":
    @ray.remote(num_cpus=0, num_gpus=1)
    def has():
        return True

    precision._has_bfloat16 = has
    print(precision.best_precision(ClusterConfig()))
    print(precision.best_precision(ClusterConfig(gpu=False)))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_every_card_is_asked() -> None:
    """A node that claims a card without having one answers like an old card."""
    for cards, wanted in (("0", ["float32"]), ("1", ["float32", "bfloat16", "float32"])):
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, cards]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.stdout.split() == wanted, done.stderr
