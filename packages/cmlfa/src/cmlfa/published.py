"""What the authors of CMLFA report, for the comparison that `test.py` prints."""

from tbps_common.report.published import PublishedRow

_SHARED = {
    "source": "the results table of the authors' README",
    "weights": "trained and tested on this data set",
    "protocol": "CLIP ViT-B/16, 384 x 128, lfa_attention batch (the numbers then depend on the test batch; default 512)",
}

PUBLISHED = (
    PublishedRow("CUHK-PEDES", "t2i", 6156, 3074, {"R1": 78.05, "R5": 90.43, "R10": 93.76, "mAP": 70.12}, **_SHARED),
    PublishedRow("RSTPReid", "t2i", 2000, 1000, {"R1": 65.05, "R5": 84.75, "R10": 90.20, "mAP": 51.03}, **_SHARED),
)
