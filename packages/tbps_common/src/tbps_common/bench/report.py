"""The benchmark's result as a table a person can read."""

from typing import Any


def render(report: dict[str, Any]) -> str:
    """One line about the data, one table, and what could not be measured."""
    from prettytable import PrettyTable

    sizes, machine, methods = report["sizes"], report["machine"], report["methods"]
    on_gpu = machine["device"] != "cpu"
    clock = "wall_s" if on_gpu else "cpu_s"
    full = {name: sizes["queries"] / entry["queries"] for name, entry in methods.items()}
    table = PrettyTable(["method", "wall s", "CPU s", "peak MB", "/ ours", "/ product", "R1", "mAP", "agrees"])
    for column in table.field_names[1:]:
        table.align[column] = "r"
    table.align["method"] = "l"
    for name, entry in methods.items():
        star = "*" if entry["scaled"] else ""
        cost = entry[clock] * full[name]
        metrics = entry["metrics"]
        table.add_row(
            [
                {"gemm": "product alone"}.get(name, name),
                f"{entry['wall_s'] * full[name]:.3f}{star}",
                f"{entry['cpu_s'] * full[name]:.3f}{star}",
                f"{entry['peak_mb']:.0f}" + (f" ({entry['queries']} queries)" if star else ""),
                f"{cost / (methods['ours'][clock] * full['ours']):.2f}",
                f"{cost / (methods['gemm'][clock] * full['gemm']):.2f}",
                f"{metrics['R1']:.2f}" if "R1" in metrics else "-",
                f"{metrics['mAP']:.2f}" if "mAP" in metrics else "-",
                {True: "yes", False: "NO", None: "-"}[entry.get("agrees")],
            ]
        )
    for name, reason in report["absent"].items():
        table.add_row([name, reason, *["-"] * 7])
    lines = [
        f"{report['preset']}: {sizes['queries']} queries x {sizes['gallery']} images x {sizes['tokens']} x {sizes['dim']}, "
        f"{sizes['positives'][0]}-{sizes['positives'][1]} images of an identity, reduce={sizes['reduce']}, "
        f"precision={report['precision']}",
        f"{machine['cpu']}, {machine['threads']} thread(s), {machine['device']}, torch {machine['torch']}; "
        f"best of {report['repeats']}; ratios of {'wall' if on_gpu else 'CPU'} seconds; peak above the features",
        table.get_string(),
    ]
    for name, entry in methods.items():
        if entry["scaled"]:
            estimate = entry.get("estimated_mb")
            needed = "" if estimate is None else f", because all would take about {estimate / 1000:.1f} GB"
            lines.append(
                f"* {name}: run on {entry['queries']} of {sizes['queries']} queries{needed}; seconds scaled to all."
            )
    return "\n".join(lines)
