"""Transforms, tokens, items and optimizer against the stored numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dp_gen import (
    DiversePersonDataset,
    DiversePersonModel,
    Transform4TestWithSegmap,
    Transform4TrainWithSegmap,
    attribute_transforms,
    build_lr_scheduler,
    build_optimizer,
    cut_attribute,
    encode_with_image_tokens,
    get_img_token_idx,
    insert_image_tokens,
    load_tokenizer,
    parse_args,
    set_trainable,
)

pytestmark = pytest.mark.golden("dp_gen")
MEAN_LEVELS = 0.02  # a wrong resize kernel stays within one level, but has a mean near 0.2


def pixels(path: Path) -> torch.Tensor:
    array = torch.from_numpy(np.array(Image.open(path)))
    return array.permute(2, 0, 1).contiguous() if array.ndim == 3 else array


def assert_same_image(got: torch.Tensor, want: torch.Tensor, name: str, allowed: float) -> None:
    levels = got * 127.5 + 127.5 if "pix" in name or "img" in name else got * 255
    difference = (levels - want.float()).abs()
    assert difference.max() <= allowed and difference.mean() <= MEAN_LEVELS, name


def assert_same_mask(got: torch.Tensor, want: torch.Tensor, name: str, allowed: float) -> None:
    assert (got.float() != want.float()).float().mean() <= allowed, name


def test_transforms(golden: Any, stored: str) -> None:
    case = golden(stored)
    tensors, tolerance = case.tensors(), case.case["tolerance"]
    args = parse_args(default=True)
    for item in case.case["items"]:
        number, args.resolution = item["index"], item["resolution"]
        image, seg = pixels(case.folder / item["image"]), pixels(case.folder / item["seg"])
        train, test = Transform4TrainWithSegmap(args), Transform4TestWithSegmap(args)
        for kind, (img, mask) in {
            "flip0": train(image, seg, flip=False),
            "flip1": train(image, seg, flip=True),
            "test": test(image, seg),
        }.items():
            assert_same_image(img, tensors[f"img{number}_{kind}"], f"img{number}_{kind}", tolerance["image_abs_levels"])
            assert_same_mask(mask, tensors[f"seg{number}_{kind}"], kind, tolerance["seg_mismatch_fraction"])
        untouched = image.clone()
        cut = cut_attribute(image, tensors[f"bg{number}"], seg, item["cut_id"], item["bbox"])
        assert torch.equal(cut, tensors[f"cut{number}"]) and torch.equal(image, untouched)
        attribute = attribute_transforms(item["resolution"])(cut)
        assert_same_image(attribute, tensors[f"attr{number}"], "attr", tolerance["image_abs_levels"])


test_transforms.stored_prefix = "transforms"  # type: ignore[attr-defined]


def test_tokens(golden: Any, stored: str) -> None:
    case = golden(stored)
    tokenizer = load_tokenizer(str(case.folder.parent / case.case["tokenizer"]))
    assert tokenizer.convert_tokens_to_ids("<|image|>") == case.case["image_token_id"]
    for row in case.case["rows"]:
        ids, mask = encode_with_image_tokens(tokenizer, row["text"])
        assert ids.tolist() == [row["input_ids"]] and ids.dtype == torch.int64
        assert mask[0].nonzero()[:, 0].tolist() == row["mask_positions"]
        idx, idx_mask = get_img_token_idx(mask, row["N"])
        assert (idx.tolist(), idx_mask.tolist()) == ([row["idx"]], [row["idx_mask"]])
    for row in case.case["inserts"]:
        assert insert_image_tokens(row["description"], row["segments"]) == row["text"]


test_tokens.stored_prefix = "tokenize"  # type: ignore[attr-defined]


def test_items(golden: Any, helpers: Any, stored: str) -> None:
    case = golden(stored)
    tensors, tolerance = case.tensors(), case.case["tolerance"]
    tokenizer = load_tokenizer(str(case.folder.parent / case.case["tokenizer"]))
    for entry in case.case["items"]:
        args = helpers.golden_args(case, {"reference_attribute_types": entry["reference_attribute_types"]})
        dataset = DiversePersonDataset(case.folder.parent / case.case["root"], tokenizer, args)
        wanted = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{entry['key']}.")}
        background = wanted.pop("background", None)
        assert dataset.img_ids[entry["index"]] == entry["img_id"]
        loaded = dataset.load(entry["index"])
        item = dataset.preprocess(*loaded, flip=entry["flip"], background=background)
        assert item.keys() == wanted.keys()
        for name, value in wanted.items():
            if name in ("pix_v", "attribute_v"):
                assert_same_image(item[name], value, name, tolerance["image_abs_levels"])
            elif name == "attribute_seg_maps":
                assert_same_mask(item[name], value, name, tolerance["seg_mismatch_fraction"])
            else:
                assert torch.equal(item[name], value.to(item[name].dtype)), name


test_items.stored_prefix = "dataset"  # type: ignore[attr-defined]


def test_parameter_groups_and_schedules(golden: Any, helpers: Any, stored: str) -> None:
    case = golden(stored)
    tolerance = case.case["tolerance"]
    for entry in case.case["group_cases"]:
        args = helpers.golden_args(case, entry["args"])
        model = DiversePersonModel.from_pretrained(args)
        order = set_trainable(model, args)
        groups = build_optimizer(model, args).param_groups
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert [names[id(p)] for group in groups for p in group["params"]] == order
        for group, wanted in zip(groups, entry["groups"], strict=True):
            assert sorted(names[id(parameter)] for parameter in group["params"]) == wanted["names"]
            assert (group["lr"], list(group["betas"]), group["weight_decay"], group["eps"]) == (
                pytest.approx(wanted["lr"], rel=1e-12),
                wanted["betas"],
                wanted["weight_decay"],
                wanted["eps"],
            )
    for entry in case.case["schedule_cases"]:
        args = helpers.golden_args(case, entry["args"])
        groups = [
            {"params": [torch.zeros(1)], "lr": args.lr * args.unet_lr_scale},
            {"params": [torch.ones(1)], "lr": args.lr},
        ]
        optimizer = torch.optim.AdamW(groups)
        scheduler = build_lr_scheduler(optimizer, args)
        for wanted in entry["lr"]:
            found = [group["lr"] for group in optimizer.param_groups]
            assert found == pytest.approx(wanted, rel=tolerance["rtol"], abs=tolerance["atol"])
            optimizer.step()
            scheduler.step()


test_parameter_groups_and_schedules.stored_prefix = "optim"  # type: ignore[attr-defined]
