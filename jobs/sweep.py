"""A search over learning rate, batch size and N, or over a baseline's settings: the best of each N, and the curve."""

import sys

from rella.dist.jobs import main, sweep_job

if __name__ == "__main__":
    sys.exit(main("sweep", __doc__, sweep_job, group="sweep"))
