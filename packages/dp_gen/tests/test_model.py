"""The model: what must hold whatever the weights are."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_gen import DiversePersonController, DiversePersonModel, DiversePersonPipeline, load_tokenizer, set_trainable
from dp_gen import supervised_cross_attentions as supervised
from dp_gen.model.attention import attention_grids, checkpoint_gradients
from dp_gen.model.parts import load_generation_scheduler, load_training_scheduler
from dp_gen.model.pipeline import settings_of
from tbps_common.errors import InputError

Batch = dict[str, torch.Tensor]
MakeArgs = Callable[..., argparse.Namespace]


def draws(resolution: int = 64, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    shape = (count, 4, resolution // 8, resolution // 8)
    return {
        "posterior_noise": torch.randn(shape),
        "noise": torch.randn(shape),
        "timesteps": torch.tensor([10, 400, 900])[:count],
        "mask_uniform": torch.tensor(0.1),
    }


def test_controller_changes_marked_positions_only() -> None:
    torch.manual_seed(0)
    controller = DiversePersonController(8)
    text, attribute = torch.randn(2, 5, 8), torch.randn(2, 2, 1, 8)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = mask[1, 4] = True
    counts = torch.tensor([1, 2])
    out = controller(text, attribute, mask, counts)
    assert torch.equal(out[~mask], text[~mask])
    rows = [attribute[0, 0, 0], attribute[1, 0, 0], attribute[1, 1, 0]]
    assert torch.allclose(out[mask], controller.fuse(text[mask], torch.stack(rows)))
    with pytest.raises(ValueError, match="4 reference images for 3 marked"):
        controller(text, attribute, mask, torch.tensor([2, 2]))


def test_without_references_the_controller_has_zero_gradients() -> None:
    controller = DiversePersonController(8)
    text = torch.randn(1, 5, 8)
    out = controller(text, torch.randn(1, 2, 1, 8), torch.zeros(1, 5, dtype=torch.bool), torch.tensor([0]))
    assert torch.equal(out, text)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in controller.parameters())


def test_supervised_stages(small_args: MakeArgs) -> None:
    unet = DiversePersonModel.from_pretrained(small_args()).unet
    stages = [sorted({name.split(".attentions")[0] for name in supervised(unet, k)}) for k in range(1, 8)]
    assert stages[0] == ["mid_block"] and [len(found) for found in stages] == [1, 2, 3, 4, 5, 6, 7]
    assert stages[4] == ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2"]
    with pytest.raises(ValueError, match="between 1 and 7"):
        supervised(unet, 8)


def test_grids_follow_the_latents(small_args: MakeArgs) -> None:
    unet = DiversePersonModel.from_pretrained(small_args()).unet
    grids = attention_grids(unet, supervised(unet, 7), 9, 6)
    sizes = {name.split(".attentions")[0]: grid for name, grid in grids.items()}
    assert sizes["down_blocks.0"] == sizes["up_blocks.3"] == (9, 6)
    assert sizes["down_blocks.1"] == (5, 3) and sizes["up_blocks.1"] == (3, 2) and sizes["mid_block"] == (2, 1)


def test_capture_changes_no_number_and_outside_a_recording_nothing_is_kept(small_args: MakeArgs, batch: Batch) -> None:
    args = small_args(attribute_loc=True, loc_layers=7)
    torch.manual_seed(1)
    captured = DiversePersonModel.from_pretrained(args)
    plain = DiversePersonModel.from_pretrained(small_args())
    plain.load_state_dict(captured.state_dict())
    scheduler = load_training_scheduler(args)
    with torch.no_grad():
        one, other = captured(batch, scheduler, draws()), plain(batch, scheduler, draws())
        assert float(one["denoise_loss"]) == pytest.approx(float(other["denoise_loss"]), rel=1e-5)
        assert captured.capture is not None and not captured.capture.is_recording
        latents, steps, text = torch.randn(3, 4, 8, 8), torch.tensor([5, 5, 5]), captured.encode_condition(batch)
        assert torch.allclose(captured.unet(latents, steps, text).sample, plain.unet(latents, steps, text).sample)


def test_a_replaced_processor_is_noticed(small_args: MakeArgs, batch: Batch) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    args = small_args(attribute_loc=True)
    model = DiversePersonModel.from_pretrained(args)
    model.unet.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(RuntimeError, match="not captured"):
        model(batch, load_training_scheduler(args), draws())


def test_gradient_checkpointing_gives_the_same_gradients(small_args: MakeArgs, batch: Batch) -> None:
    args = small_args(attribute_loc=True, attribute_loc_weight=1.0)
    torch.manual_seed(1)
    model = DiversePersonModel.from_pretrained(args)
    set_trainable(model, args)
    scheduler = load_training_scheduler(args)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_gradients(model.unet, model.capture)
            assert model.unet.down_blocks[0].gradient_checkpointing
        model.zero_grad()
        model.train()(batch, scheduler, draws())["loss"].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_padding_slots_and_their_content_do_not_matter(small_args: MakeArgs, batch: Batch) -> None:
    model = DiversePersonModel.from_pretrained(small_args())
    other = dict(batch)
    other["attribute_v"] = batch["attribute_v"].clone()
    padding = torch.arange(3) >= batch["reference_attribute_num"][:, None]
    assert padding.any()
    other["attribute_v"][padding] = 0.7
    with torch.no_grad():
        assert torch.equal(model.encode_condition(batch), model.encode_condition(other))
        whole = model.controller(
            model.encode_text(batch["input_ids"]),
            model.encode_image(batch["attribute_v"]),
            batch["img_token_mask"],
            batch["reference_attribute_num"],
        )
        assert torch.allclose(model.encode_condition(batch), whole, atol=1e-5)


def test_a_batch_without_references_trains_with_gradients_everywhere(small_args: MakeArgs, batch: Batch) -> None:
    args = small_args(attribute_loc=True, mask_loss=True, train_image_encoder=True, image_encoder_trainable_layers=2)
    model = DiversePersonModel.from_pretrained(args)
    names = set_trainable(model, args)
    empty = {name: value for name, value in batch.items() if not name.endswith("_places")}
    empty["img_token_mask"] = torch.zeros_like(batch["img_token_mask"])
    empty["img_token_idx_mask"] = torch.zeros_like(batch["img_token_idx_mask"])
    empty["reference_attribute_num"] = torch.zeros_like(batch["reference_attribute_num"])
    losses = model(empty, load_training_scheduler(args), draws())
    losses["loss"].backward()
    assert float(losses["localization_loss"].detach()) == 0
    parameters = dict(model.named_parameters())
    assert all(parameters[name].grad is not None for name in names)


def test_drawn_numbers_follow_the_documented_order(small_args: MakeArgs, batch: Batch) -> None:
    args = small_args(mask_loss=True)
    model = DiversePersonModel.from_pretrained(args)
    scheduler = load_training_scheduler(args)
    with torch.no_grad():
        torch.manual_seed(3)
        drawn = model(batch, scheduler)
        torch.manual_seed(3)
        shape = (3, 4, 8, 8)
        given = {"posterior_noise": torch.randn(shape), "noise": torch.randn(shape)}
        given |= {"timesteps": torch.randint(0, 1000, (3,)), "mask_uniform": torch.rand(())}
        assert torch.equal(model(batch, scheduler, given)["loss"], drawn["loss"])


def test_latents_keep_the_vaes_type(small_args: MakeArgs, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU autocast's exponential gives the posterior's deviation in float32, which must not widen the latents."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    model = DiversePersonModel.from_pretrained(small_args()).bfloat16()
    wide = DiagonalGaussianDistribution.__init__

    def as_on_a_gpu(self: Any, parameters: torch.Tensor, deterministic: bool = False) -> None:
        wide(self, parameters, deterministic)
        self.std = self.std.float()

    monkeypatch.setattr(DiagonalGaussianDistribution, "__init__", as_on_a_gpu)
    assert model.encode_latents(batch["pix_v"]).dtype == torch.bfloat16


def test_parts_that_do_not_fit_are_named(small_args: MakeArgs) -> None:
    model = DiversePersonModel.from_pretrained(small_args())
    model.image_encoder.config.projection_dim = 16
    with pytest.raises(InputError, match="--image_encoder_hf"):
        DiversePersonModel(model.text_encoder, model.image_encoder, model.vae, model.unet, small_args())


def test_the_final_folder_loads_here_and_in_diffusers(small_args: MakeArgs, batch: Batch, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    args = small_args(attribute_loc=True)
    model = DiversePersonModel.from_pretrained(args)
    tokenizer = load_tokenizer(args.pretrained_model_hf)
    with torch.no_grad():
        before = model.encode_condition(batch)
        for _ in range(2):  # the second one replaces the first
            DiversePersonPipeline(model, tokenizer, load_generation_scheduler(args), settings_of(args)).save_pretrained(
                tmp_path
            )
        loaded = DiversePersonPipeline.from_pretrained(tmp_path)
        assert torch.equal(loaded.model.encode_condition(batch), before)
    assert loaded.settings["max_reference_attribute_num"] == 3 and loaded.settings["args"]["resolution"] == 64
    assert loaded.tokenizer.convert_tokens_to_ids("<|image|>") == tokenizer.convert_tokens_to_ids("<|image|>")
    assert type(loaded.scheduler).__name__ == "PNDMScheduler"
    plain = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(plain.unet.conv_in.weight, model.unet.conv_in.weight)
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / ".pipeline.tmp").exists()
    (tmp_path / "dp_gen_config.json").unlink()
    with pytest.raises(InputError, match="complete result"):
        DiversePersonPipeline.from_pretrained(tmp_path)


def test_half_precision_rounds_what_is_frozen_and_not_what_is_trained(small_args: MakeArgs) -> None:
    args = small_args(train_image_encoder=True, image_encoder_trainable_layers=1)
    model = DiversePersonModel.from_pretrained(args)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = set(set_trainable(model, args, torch.bfloat16))
    assert any(name.startswith("image_encoder.") for name in trained) and len(trained) < len(before)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
        assert torch.equal(parameter, before[name].to(parameter.dtype)), name
