"""Dry runs of the five systems at the sizes of their papers on a GPU that is not there:  `python tests/gpu/dry_run.py`.

The networks are built on the meta device and moved to the GPU of `fake_cuda`. Printed is a Markdown table: peak memory,
weights, operations, waits for the device.
"""

import argparse
import copy
import sys
import warnings
from dataclasses import dataclass

from fake_cuda import DEVICE, fake_cuda, on_device
from paper_systems import SYSTEMS, Place, Size, System, accelerate_on


@dataclass(frozen=True)
class Cost:
    """What a phase took.

    Attributes:
        peak: GiB of the device at most, weights and optimizer included.
        weights: GiB of parameters and buffers.
        tflop: operations of matrix products, convolutions and attention, backward pass included.
        half_share: share of them in half precision.
        waits: "what, at which lines" -> how often the host waited for the device.
    """

    peak: float
    weights: float
    tflop: float
    half_share: float
    waits: dict[str, int]


def measure(system: System, size: Size = "paper") -> dict[str, Cost]:
    """Phase -> its cost, on a network of its own. The second run counts, because the first one makes what stays."""
    network = system.build(size)
    costs = {}
    for name, phase in system.phases.items():
        with fake_cuda() as device, accelerate_on(DEVICE):
            placed = on_device(copy.deepcopy(network))
            weights = device.live
            run = phase.start(placed, Place(DEVICE, phase.count, device.start))
            run()
            device.start()
            run()
            tflop = sum(device.flops.values()) / 1e12
            costs[name] = Cost(device.peak / 2**30, weights / 2**30, tflop, device.half_share, dict(device.waits))
            del placed, run
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SYSTEMS)}; all by default")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*pin_memory.*")
    print("| dry run, no GPU | peak GiB | weights GiB | TFLOP | in half precision | waits |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in args.names or SYSTEMS:
        phases = SYSTEMS[name].phases
        for phase, cost in measure(SYSTEMS[name]).items():
            what = f"{name}: {phase}, {phases[phase].count} {phases[phase].items}"
            numbers = f"{cost.peak:.1f} | {cost.weights:.1f} | {cost.tflop:.2g} | {cost.half_share:.0%}"
            print(f"| {what} | {numbers} | {sum(cost.waits.values())} |", flush=True)
            for wait, count in cost.waits.items():
                print(f"  {count} x {wait}", file=sys.stderr)


if __name__ == "__main__":
    main()
