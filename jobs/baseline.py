"""A baseline of the paper's Table 2, trained on the whole training split or on N shots (--shots), and its scores.

ID-based (--baseline.*): --model deepfm | autoint | dcnv2 | gru4rec | caser | sasrec | din | sim; SIM's --search
semantic | hard | soft; semantic search takes the behaviours that SUBR retrieved by the item vectors of an LLM, --lm.

LM-based (--textctr.*): --model ctr-bert | ptab | p5, on the BERT or T5 that --base names (hub name or folder).

Here --model, --search and --base mean --baseline.model, --baseline.search and --textctr.base, and --lm is what other
jobs call --model. A flag of --baseline or --textctr that the model does not feel is an error.
"""

import sys

from rella.dist.jobs import baseline_job, baseline_settings, baseline_words, main

if __name__ == "__main__":
    sys.exit(main("baseline", __doc__, baseline_job, baseline_words(sys.argv[1:]), baseline_settings))
