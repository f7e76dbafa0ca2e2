"""Run as a program by the sharding tests: real gloo groups over files of work.

    python ranking_group.py WORLD FOLDER

`FOLDER/work.pt` holds a list of cases; the answers of each process go to `FOLDER/answers.RANK.pt`. A case of n shards runs
on a group of the first n processes. They are forked where the system can, because importing torch takes seconds.
"""

import multiprocessing
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tbps_common.ranking import evaluate_rows, rerank_rows, retrieve, score_rows


def shard_rows(scores, fault):
    """Rows of a shard that fail when the process is told to: `{"kind", "calls": which calls of rows}`."""
    calls = 0

    def rows(start, stop):
        nonlocal calls
        calls += 1
        block = scores[start:stop].clone()
        if fault is not None and calls in fault["calls"]:
            if fault["kind"] == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory (simulated).")
            if fault["kind"] == "nan":
                block[0, 0] = float("nan")
            else:
                raise KeyError("simulated")
        return block

    return rows


def answer(case, rank, group):
    start = sum(case["shards"][:rank])
    own = slice(start, start + case["shards"][rank])
    fault = case["fault"] if case.get("fault") and case["fault"]["rank"] == rank else None
    options = dict(case["options"], group=group)
    options.update(case.get("options_of_rank", {}).get(rank, {}))
    try:
        if "scores" in case:
            rows = shard_rows(case["scores"][:, own], fault)
            result = evaluate_rows(rows, case["q_pids"], case["g_pids"][own], **options)
        elif "itm" in case:
            rows = score_rows(case["query"], case["gallery"][own], group=group)
            first = evaluate_rows(rows, case["q_pids"], case["g_pids"][own], topk=case["itm"].shape[1], group=group)
            fused = rerank_rows(rows, case["shards"][rank], first.indices, case["itm"], group=group)
            result = evaluate_rows(fused, case["q_pids"], case["g_pids"][own], **options)
        else:
            gallery = case["gallery"][own].clone()
            if fault is not None:
                gallery[0, 0] = float("inf")
            result = retrieve(case["query"], gallery, case["q_pids"], case["g_pids"][own], **options)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return vars(result)


def work(rank, world, folder):
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    cases = torch.load(folder / "work.pt", weights_only=True)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
    answers = []
    for case in cases:
        size = len(case["shards"])
        answers.append(answer(case, rank, groups[size]) if rank < size else None)
        dist.barrier()
    torch.save(answers, folder / f"answers.{rank}.pt")
    dist.destroy_process_group()


def main(world, folder):
    torch.set_num_threads(1)
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    processes = [context.Process(target=work, args=(rank, world, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 300
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.terminate()  # one that waits for a message nobody sends
        process.join()
    return int(any(process.exitcode != 0 for process in processes))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
