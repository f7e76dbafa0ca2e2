"""Run as a program by the tests of several processes: real gloo groups over work in a folder.

    python gloo_group.py FOLDER

`FOLDER/work.pt` is a list of jobs, each for `world` processes; the answers of each process go to
`FOLDER/answers.JOB.RANK.pt`. The processes are forked, because importing the libraries takes seconds.
"""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mra import Retrieval
from tbps_common.run.distributed import Ranks


def contrastive(work: dict[str, Any], rank: int) -> dict[str, Any]:
    """Loss and gradients of `get_contrastive_loss` with this process's share of the batch."""
    model = Retrieval(work["config"], init_backbones=False)
    model.temp.data.fill_(work["temp"])
    image, text = (work[name][rank].clone().requires_grad_(True) for name in ("image_feat", "text_feat"))
    loss = model.get_contrastive_loss(image, text, work["idx"][rank])
    loss.backward()
    return {"loss": loss.detach(), "grad_image": image.grad, "grad_text": text.grad, "grad_temp": model.temp.grad}


def forward(work: dict[str, Any], rank: int) -> dict[str, Any]:
    """Losses of `forward` with this process's share of a batch and of its negatives."""
    model = Retrieval(work["config"], init_backbones=False)
    model.load_state_dict(work["state"])
    losses = model(**work["batches"][rank], negatives=work["negatives"])
    torch.stack(losses).sum().backward()
    return {"losses": torch.stack(losses).detach(), "grad_temp": model.temp.grad}


def evaluate(work: dict[str, Any], rank: int) -> dict[str, Any]:
    """Evaluation of a split, shared by the processes; `stop_at`: the question at which to say stop."""
    from mra import RetrievalTestDataset, build_tokenizer
    from mra.retrieval import EvaluationStopped, evaluate_split

    model = Retrieval(work["config"], init_backbones=False)
    model.load_state_dict(work["state"])
    questions = 0

    def stop() -> bool:
        nonlocal questions
        questions += 1
        return questions == work.get("stop_at")

    try:
        result = evaluate_split(
            model,
            RetrievalTestDataset(work["test_file"], work["config"]),
            build_tokenizer(work["text_encoder"]),
            work["config"],
            device=torch.device("cpu"),
            ranks=Ranks(rank, work["world"], rank),
            score_world=work["score_world"],
            num_workers=0,
            stop=stop,
        )
    except EvaluationStopped:
        return {"stopped_at": questions}
    assert model.training
    parts = {"itc": result.itc, "itm": result.itm}
    return {
        name: {"metrics": part.metrics, "scores": part.scores, "indices": part.indices} for name, part in parts.items()
    }


def run(job: int, work: dict[str, Any], rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    world = work["world"]
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting.{job}", rank=rank, world_size=world)
    answer = {"contrastive": contrastive, "forward": forward, "evaluate": evaluate}[work["what"]]
    torch.save(answer(work, rank), f"{folder}/answers.{job}.{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def main() -> int:
    folder = str(Path(sys.argv[1]).resolve())
    context = multiprocessing.get_context("fork")
    for job, work in enumerate(torch.load(f"{folder}/work.pt", weights_only=True)):
        processes = [context.Process(target=run, args=(job, work, rank, folder)) for rank in range(work["world"])]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
