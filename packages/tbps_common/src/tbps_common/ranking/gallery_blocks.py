"""The gallery in blocks on the scoring device, the next block travelling while this one is scored."""

from collections.abc import Iterator

import torch
from torch import Tensor


def gallery_blocks(gallery: Tensor, size: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """Yield `(start, stop, block)` over the first dimension, each block on `device`.

    A block is valid until the next one is asked for. From host memory (also a memory map) to CUDA the blocks pass
    through two page-locked buffers on a copy stream of their own; on the gallery's own device they are views.
    """
    bounds = [(start, min(start + size, len(gallery))) for start in range(0, len(gallery), size)]
    if device.type == "cuda" and gallery.device.type == "cpu" and bounds:
        yield from _through_pinned_buffers(gallery, bounds, device)
        return
    for start, stop in bounds:
        yield start, stop, gallery[start:stop].to(device)


def _through_pinned_buffers(
    gallery: Tensor, bounds: list[tuple[int, int]], device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    shape = (bounds[0][1], *gallery.shape[1:])
    compute, copy = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    pinned = [torch.empty(shape, dtype=gallery.dtype, pin_memory=True) for _ in range(2)]
    resident = [torch.empty(shape, dtype=gallery.dtype, device=device) for _ in range(2)]
    copied, used = [torch.cuda.Event() for _ in range(2)], [torch.cuda.Event() for _ in range(2)]
    copy.wait_stream(compute)  # the memory of `resident` may still be read by work queued before

    def send(number: int) -> None:
        slot, (start, stop) = number % 2, bounds[number]
        copied[slot].synchronize()  # the previous transfer out of this page-locked buffer
        pinned[slot][: stop - start].copy_(gallery[start:stop])
        copy.wait_event(used[slot])
        with torch.cuda.stream(copy):
            resident[slot][: stop - start].copy_(pinned[slot][: stop - start], non_blocking=True)
            copied[slot].record(copy)

    send(0)
    for number, (start, stop) in enumerate(bounds):
        slot = number % 2
        compute.wait_event(copied[slot])
        yield start, stop, resident[slot][: stop - start]
        used[slot].record(compute)
        if number + 1 < len(bounds):
            send(number + 1)
    copy.synchronize()
