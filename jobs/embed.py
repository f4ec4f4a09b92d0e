"""Item sentences to semantic vectors: LLM, mean pooling, PCA (paper, section 3.2)."""

import sys

from rella.dist.jobs import embed_job, main

if __name__ == "__main__":
    sys.exit(main("embed", __doc__, embed_job))
