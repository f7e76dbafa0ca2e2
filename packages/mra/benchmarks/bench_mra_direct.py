"""The direct form of MRA's losses and re-ranking, as released: what `bench_mra` compares this package with."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mra.model import Retrieval


def losses(model: "Retrieval", batch: dict[str, "Tensor"], negatives: dict[str, Any]) -> "Tensor":
    """ITC, ITM and MLM with one pass of all tokens for each."""
    import torch
    import torch.nn.functional as F

    image, atts = model.get_vision_embeds(batch["image"])
    image_feat = model.get_image_feat(image)
    itc, itm = [], []
    for name, suffix, weight in (("main", "", 1.0), ("eda", "_eda", 0.8)):
        text_atts = batch[f"text_atts{suffix}"]
        text = model.get_text_embeds(batch[f"text_ids{suffix}"], text_atts)
        itc.append(weight * model.get_contrastive_loss(image_feat, model.get_text_feat(text), batch["idx"]))
        draws(model, batch["feat"], batch["idx"])
        image_rows, text_rows = negatives[name]
        own = torch.arange(len(text), device=text.device)
        positive = model.get_cross_embeds(image, atts, text, text_atts)[:, 0]
        rows, text_rows = torch.cat([image_rows, own]), torch.cat([own, text_rows])
        negative = model.get_cross_embeds(image[rows], atts[rows], text[text_rows], text_atts[text_rows])[:, 0]
        labels = torch.cat([torch.ones(len(own), dtype=torch.long), torch.zeros(len(rows), dtype=torch.long)])
        logits = model.itm_head(torch.cat([positive, negative]))
        itm.append(weight * F.cross_entropy(logits.float(), labels.to(text.device)))
    text = model.get_text_embeds(batch["text_ids_masked"], batch["text_atts"])
    fused = model.get_cross_embeds(image, atts, text, batch["text_atts"])
    places = batch["masked_pos"].unsqueeze(-1).expand(-1, -1, fused.shape[-1])
    logits = model.text_encoder.cls(fused.gather(1, places))
    mlm = F.cross_entropy(logits.flatten(0, 1).float(), batch["masked_ids"].flatten())
    return torch.stack([torch.stack(itc).sum(), torch.stack(itm).sum(), mlm])


def draws(model: "Retrieval", feat: "Tensor", idx: "Tensor") -> tuple[list[int], list[int]]:
    """Negatives sample by sample: the CPU waits for each of them."""
    import torch

    weights = model.itm_negative_weights(feat, feat, idx)
    drawn = [[int(torch.multinomial(row, 1).item()) for row in part] for part in weights]
    return drawn[1], drawn[0]


def optimizer(model: "Retrieval", settings: dict[str, Any]) -> Any:
    """AdamW without the fused kernel."""
    import torch

    from mra import param_groups

    groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in param_groups(model, settings)]
    return torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.98), eps=1e-8, foreach=False, fused=False)


def scores(
    model: "Retrieval", sims: "Tensor", images: list["Tensor"], text: "Tensor", atts: "Tensor", k: int
) -> "Tensor":
    """One caption at a time against its k images, all tokens through all layers, score_world 4 without its constant."""
    import torch

    step = len(sims) // 4 + 1
    total = 0.004 * 2 * (sims - sims.min()) / (sims.max() - sims.min())
    for embeds in images:
        matrix = torch.full_like(sims, 1000.0)
        for query, row in enumerate(sims):
            chosen = row.topk(k).indices
            rows = embeds[chosen]
            visible = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
            fused = model.get_cross_embeds(rows, visible, text[query].repeat(k, 1, 1), atts[query].repeat(k, 1))
            matrix[query, chosen] = model.itm_head(fused[:, 0])[:, 1].float()
            matrix[query, matrix[query] == 1000.0] = matrix[query, chosen].min()
        for start in range(0, len(sims), step):
            part = matrix[start : start + step]
            total[start : start + step] += (part - part.min()) / (1000.0 - part.min()) / 2
    return total


def map_percent(scores: "Tensor", q_pids: "Tensor", g_pids: "Tensor") -> float:
    """mAP in percent with a loop over the columns of the sorted matrix."""
    import torch

    order = scores.cpu().argsort(dim=1, descending=True, stable=True)
    matches = g_pids[order].eq(q_pids.view(-1, 1))
    hits = matches.cumsum(1)
    precision = torch.stack([hits[:, column] / (column + 1.0) for column in range(matches.shape[1])], dim=1)
    return 100 * ((precision * matches).sum(1) / hits[:, -1]).mean().item()
