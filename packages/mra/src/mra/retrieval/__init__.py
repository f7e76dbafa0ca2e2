"""Retrieval with a trained network: encode texts and images, judge the most similar pairs with the fusion encoder.

`mra.evaluate` measures it; its names are offered here too.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "mra",
    submod_attrs={
        "evaluate": ["EvaluationStopped", "evaluate_split"],
        "report": ["SplitEvaluation", "write_reports"],
        "retrieval.encode": ["encode_images", "encode_texts"],
        "retrieval.metrics": ["retrieval_metrics"],
        "retrieval.rerank": ["itm_rerank", "match_logits"],
    },
)
