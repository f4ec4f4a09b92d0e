"""A baseline of the paper's Table 2, trained on the whole training split or on N shots (--shots), and its scores.

--model deepfm | autoint | dcnv2 | gru4rec | caser | sasrec | din | sim; SIM's --search semantic | hard | soft; semantic
search takes the behaviours that SUBR retrieved by the item vectors of an LLM, --lm. Here --model and --search mean
--baseline.model and --baseline.search, and --lm is what other jobs call --model.
"""

import sys

from rella.dist.jobs import baseline_job, baseline_words, full_shot, main

if __name__ == "__main__":
    sys.exit(main("baseline", __doc__, baseline_job, baseline_words(sys.argv[1:]), full_shot))
