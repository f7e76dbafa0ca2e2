"""What the paper of MRA reports, for the comparison that `run.py --evaluate` prints."""

from tbps_common.report.published import PublishedRow

_SHARED = {
    "source": "the main results table of the paper (arXiv 2507.10195)",
    "weights": "pre-trained on SDA, fine-tuned and tested on this data set (ft_cuhk.pth, ft_icfg.pth, ft_rstp.pth)",
    "protocol": "384 x 256, the k_test most similar images re-ranked by the fusion encoder",
}

PUBLISHED = (
    PublishedRow("CUHK-PEDES", "t2i", 6156, 3074, {"R1": 77.21, "R5": 90.66, "R10": 94.46, "mAP": 68.50}, **_SHARED),
    PublishedRow("ICFG-PEDES", "t2i", 19848, 19848, {"R1": 68.93, "R5": 83.46, "R10": 88.07, "mAP": 41.38}, **_SHARED),
    PublishedRow("RSTPReid", "t2i", 2000, 1000, {"R1": 68.15, "R5": 86.30, "R10": 91.10, "mAP": 53.77}, **_SHARED),
)
