"""Resampling of Swin's relative-position tables from one window size to another."""

import math

import numpy as np
import torch
from torch import Tensor

from tbps_common.errors import CheckpointError


def interpolate_relative_pos_embed(table: Tensor, dst_num_pos: int) -> Tensor:
    """Resample a table of relative positions, as Swin's fine-tuning at another window size does (geometric spline).

    The source positions are laid out with distances that grow by a factor q, chosen so that they reach the border of the
    target; a bicubic spline through them is read at the whole numbers of the target.

    Args:
        table: `[(2w - 1)^2, heads]`, row by row.
        dst_num_pos: `(2v - 1)^2` rows wanted.

    Returns:
        `[dst_num_pos, heads]` in the dtype and on the device of `table`; the table itself if it has that size already.

    Raises:
        CheckpointError: a size that is no square of an odd number, or a source window below 3 (a cubic spline needs four
            points).
    """
    side, target = _side(len(table), "the table"), _side(dst_num_pos, "the model")
    if side == target:
        return table
    if side < 5:
        raise CheckpointError(
            f"A relative-position table of {side} x {side} entries is too small to be resampled to {target} x {target}: "
            "the checkpoint's window must be at least 3."
        )
    from scipy.interpolate import RectBivariateSpline

    source = _grid(side // 2, target // 2)
    wanted = np.arange(-(target // 2), target // 2 + 1, dtype=np.float64)
    values = table.detach().to("cpu", torch.float64).view(side, side, -1).numpy()
    heads = [RectBivariateSpline(source, source, values[:, :, head])(wanted, wanted) for head in range(values.shape[2])]
    resampled = torch.from_numpy(np.stack(heads, axis=-1).reshape(dst_num_pos, -1))
    return resampled.to(table.device, table.dtype)


def _grid(half: int, target_half: int) -> np.ndarray:
    """Positions -d_n .. -d_1, 0, d_1 .. d_n with d_k = 1 + q + ... + q^(k-1)."""
    left, right = 1.01, 1.5
    ratio = left
    while right - left > 1e-6:
        ratio = (left + right) / 2
        if (1 - ratio**half) / (1 - ratio) > target_half:
            right = ratio
        else:
            left = ratio
    distances = np.cumsum([ratio**power for power in range(half)])
    return np.concatenate([-distances[::-1], [0.0], distances])


def _side(rows: int, what: str) -> int:
    side = math.isqrt(rows)
    if side * side != rows or side % 2 == 0:
        raise CheckpointError(f"{what} has {rows} relative positions, which is not the square of an odd number.")
    return side
