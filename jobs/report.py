"""Tables and figures of the paper, ours beside the paper's: one page, Markdown, SVG and PDF. Runs what is missing.

    python jobs/report.py all
    python jobs/report.py table2 figure7 --dataset ml-1m --raw-dir DIR --model vicuna-13b

table1 to table9, figure1, figure6, figure7, figure8, or all. Flags under --report set the scale: the two few-shot N,
the N of Figure 7, the K of Table 4 and Figures 1 and 6, backbones and baselines. What was made before is taken.
"""

import sys

from rella.dist.jobs import main, report_job, report_words

if __name__ == "__main__":
    sys.exit(main("report", __doc__, report_job, report_words(sys.argv[1:]), group="report"))
