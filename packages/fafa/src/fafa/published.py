"""What is known of FAFA's results on ITCPR, for the comparison that `inference_fafa.py` prints."""

from tbps_common.report.published import PublishedRow

PUBLISHED = (
    PublishedRow(
        "ITCPR",
        "com",
        2202,
        20510,
        {"R1": 46.6848, "R5": 66.2579, "R10": 73.2516, "mAP": 55.6917},  # 1028, 1459 and 1613 of the queries
        source="the released checkpoint, evaluated",
        weights="the authors' released checkpoint, ViT-g, trained on SynCPR",
        protocol="zero-shot, fda_k 6",
    ),
    PublishedRow(
        "ITCPR",
        "com",
        2202,
        20510,
        {"R1": 46.54, "mAP": 55.60},
        source="the paper (arXiv 2311.16515)",
        weights="ViT-g, trained on SynCPR",
        protocol="zero-shot, fda_k 6",
    ),
)
