"""The main job: every missing stage from raw ratings to the table of AUC, log loss and accuracy (paper, Table 3)."""

import sys

from rella.dist.jobs import main, reit_job

if __name__ == "__main__":
    sys.exit(main("reit", __doc__, reit_job))
