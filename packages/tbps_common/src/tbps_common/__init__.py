"""Shared room of the five person-retrieval papers: data sets, ranking, metrics, result pictures."""
