"""Published results of DiaNA on ChatPedes, for the comparison that `eval.sh` prints.

Empty: neither the authors' README nor their repository holds a table of results. Rows of the paper's table (CVPR 2025) go here.
"""

from tbps_common.report.published import PublishedRow

PUBLISHED: tuple[PublishedRow, ...] = ()
