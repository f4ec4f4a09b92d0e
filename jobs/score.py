"""Score samples with any base model and any adapter or none (paper, section 2.3)."""

import sys

from rella.dist.jobs import main, score_job

if __name__ == "__main__":
    sys.exit(main("score", __doc__, score_job))
