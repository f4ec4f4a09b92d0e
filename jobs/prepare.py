"""Raw ratings to users, items, interactions and samples (paper, Appendix B)."""

import sys

from rella.dist.jobs import main, prepare_job

if __name__ == "__main__":
    sys.exit(main("prepare", __doc__, prepare_job))
