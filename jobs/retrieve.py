"""For every sample the behaviours closest to its target: SUBR (paper, section 3.2)."""

import sys

from rella.dist.jobs import main, retrieve_job

if __name__ == "__main__":
    sys.exit(main("retrieve", __doc__, retrieve_job))
