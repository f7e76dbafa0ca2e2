"""Models and batches of the benchmark: random weights, a made-up vocabulary, nothing downloaded."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fafa.model import Blip2FAFACPR
from fafa.model.settings import ModelSettings, QFormerSettings, read_settings

WORDS = "a the man woman wearing with red blue black grey coat jeans skirt backpack shoes and short long hair".split()
BERT_WORDS = 30522


def settings_of(args: argparse.Namespace) -> ModelSettings:
    """The paper's sizes with `--full-size`, else those of the flags. Dropout is off, so that both forms agree."""
    if args.full_size:
        paper = read_settings("pretrain")
        return replace(
            paper,
            load_pretrained=False,
            vit_precision=args.vit_precision,
            qformer=replace(paper.qformer, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        )
    return ModelSettings(
        image_size=args.image_size,
        num_query_token=args.query_tokens,
        load_pretrained=False,
        vit_width=args.vit_width,
        vit_depth=args.vit_depth,
        vit_heads=max(args.vit_width // 64, 1),
        vit_precision="fp32",
        embed_dim=args.embed_dim,
        fda_k=min(6, args.query_tokens),
        qformer=QFormerSettings(
            hidden_size=args.qformer_width,
            num_hidden_layers=args.qformer_depth,
            num_attention_heads=max(args.qformer_width // 64, 1),
            intermediate_size=4 * args.qformer_width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            init_from=None,
        ),
    )


def build_model(args: argparse.Namespace, device: torch.device) -> Blip2FAFACPR:
    """A model with random weights, made where it will run; a GPU's ViT is cast."""
    from fafa.model import place

    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        words += [f"word{index}" for index in range(BERT_WORDS - len(words) if args.full_size else 0)]
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(words), encoding="utf-8")
        settings = replace(settings_of(args), tokenizer=str(vocabulary))
        torch.manual_seed(args.seed)
        with device:
            model = Blip2FAFACPR(settings)
    return place(model, device).train()


def random_batch(args: argparse.Namespace, model: Blip2FAFACPR) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch of random images and captions, and the draws of its losses."""
    settings, count, device = model.settings, args.batch_size, model.device
    generator = torch.Generator().manual_seed(args.seed)
    shape = (count, 3, settings.image_size, settings.image_size)
    picks = torch.randint(0, len(WORDS), (count, 12), generator=generator).tolist()
    samples = {
        "image": torch.randn(shape, generator=generator).to(device),
        "target": torch.randn(shape, generator=generator).to(device),
        "text_input": model.tokenize([" ".join(WORDS[index] for index in row) for row in picks]),
        "query_id": (torch.arange(count) // 2).to(device),
    }
    tokens, width = settings.num_query_token, settings.qformer.hidden_size
    draws: dict[str, Any] = {"dsu_gate": 0.0}
    for name in ("dsu_eps_beta", "dsu_eps_gamma"):
        draws[name] = torch.randn(tokens, width, generator=generator).to(device)
    if count * tokens > settings.fd_sample_size:
        draws["fd_indices"] = torch.randperm(count * tokens, generator=generator)[: settings.fd_sample_size].to(device)
    for name in ("mfr_mask_A", "mfr_mask_B"):
        draws[name] = (torch.rand(count, width, generator=generator) < settings.mfr_mask_ratio).float().to(device)
    return samples, draws
