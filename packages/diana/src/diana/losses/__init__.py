"""The losses of DiaNA as pure functions of similarity matrices, and the gather that makes them see all processes.

Similarities are `[B, N]`: B rows of this process against the N = B * R candidates of all R processes, in rank order,
and already multiplied by the inverse temperature.
"""

from diana.losses.gather import gather_rows
from diana.losses.matching import build_targets, compute_itc, compute_sdm

__all__ = ["build_targets", "compute_itc", "compute_sdm", "gather_rows"]
