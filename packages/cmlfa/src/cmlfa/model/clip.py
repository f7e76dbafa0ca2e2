"""CLIP's two towers with all their output tokens.

The towers are open_clip's classes, whose parameters have the names and shapes of OpenAI's files. open_clip's own
forward passes return only the pooled token, so the token-level passes are written out here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from tbps_common.errors import CheckpointError, InputError
from tbps_common.run.checkpoint import load_state_dict_strictly

HEAD_WIDTH = 64


@dataclass(frozen=True)
class ClipGeometry:
    """Sizes of a CLIP model, all of which can be read off the shapes in its state dict."""

    embed_dim: int
    vision_width: int
    vision_layers: int
    patch_size: int
    context_length: int
    vocab_size: int
    text_width: int
    text_layers: int

    def grid(self, img_size: tuple[int, int], stride: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of `img_size` (height, width).

        Raises:
            InputError: the image is smaller than one patch.
        """
        if min(img_size) < self.patch_size:
            raise InputError(
                f"--img_size {img_size[0]},{img_size[1]} is smaller than one patch of this CLIP model "
                f"({self.patch_size} x {self.patch_size} pixels): choose a larger size."
            )
        height, width = ((side - self.patch_size) // stride + 1 for side in img_size)
        return height, width


def clip_geometry(state: Mapping[str, Tensor], source: str, prefix: str = "") -> ClipGeometry:
    """Infer the sizes of a CLIP model from its state dict.

    Args:
        state: tensors with OpenAI's names behind `prefix`; other entries are ignored. A CMLFA checkpoint holds them
            behind `base_model.`.
        source: what to call the file in an error message.
        prefix: what precedes every name of the CLIP model.

    Raises:
        CheckpointError: it is not a CLIP model, or is one of the ResNet variants, which have no token-level output.
    """

    def shape(name: str) -> torch.Size:
        if prefix + name not in state:
            raise CheckpointError(
                f"{source} holds no tensor {prefix + name}, so it is not a CLIP model with a ViT image tower in OpenAI's "
                "layout: give --pretrain_choice the name ViT-B/16, ViT-B/32 or ViT-L/14, or such a file."
            )
        return state[prefix + name].shape

    if prefix + "visual.proj" not in state and prefix + "visual.attnpool.positional_embedding" in state:
        raise CheckpointError(
            f"{source} is a ResNet variant of CLIP, whose image tower has no token-level output: "
            "choose a ViT model for --pretrain_choice."
        )
    block = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    vision_prefix = prefix + "visual."
    geometry = ClipGeometry(
        embed_dim=shape("text_projection")[1],
        vision_width=shape("visual.conv1.weight")[0],
        vision_layers=sum(k.startswith(vision_prefix) and k.endswith(".attn.in_proj_weight") for k in state),
        patch_size=shape("visual.conv1.weight")[-1],
        context_length=shape("positional_embedding")[0],
        vocab_size=shape("token_embedding.weight")[0],
        text_width=shape("ln_final.weight")[0],
        text_layers=len({match[1] for key in state if (match := block.match(key))}),
    )
    for tower, width in (("image", geometry.vision_width), ("text", geometry.text_width)):
        if width % HEAD_WIDTH:
            raise CheckpointError(
                f"The {tower} tower of {source} is {width} wide; CLIP's attention heads need a multiple of {HEAD_WIDTH}."
            )
    return geometry


def build_clip(geometry: ClipGeometry, img_size: tuple[int, int], stride: int) -> CLIP:
    """A CLIP model of that geometry for images of `img_size` (height, width), freshly initialised, without its scale.

    A stride below the patch size makes the patches overlap.
    """
    height, width = geometry.grid(img_size, stride)
    clip = CLIP(
        embed_dim=geometry.embed_dim,
        vision_cfg=CLIPVisionCfg(
            layers=geometry.vision_layers,
            width=geometry.vision_width,
            head_width=HEAD_WIDTH,
            patch_size=geometry.patch_size,
            # The size that gives this many positions when the patches do not overlap; the stride is set below.
            image_size=(height * geometry.patch_size, width * geometry.patch_size),
        ),
        text_cfg=CLIPTextCfg(
            context_length=geometry.context_length,
            vocab_size=geometry.vocab_size,
            width=geometry.text_width,
            heads=geometry.text_width // HEAD_WIDTH,
            layers=geometry.text_layers,
        ),
        quick_gelu=True,
        # Selects the LayerNorm that computes in float32 and casts back, which a half-precision model needs.
        cast_dtype=torch.float16,
    )
    cast(VisionTransformer, clip.visual).conv1.stride = (stride, stride)
    # The temperature of CMLFA is a constant flag; official checkpoints have no such key.
    del clip.logit_scale
    return clip


def load_start_weights(clip: CLIP, state: Mapping[str, Tensor], grid: tuple[int, int], source: str) -> None:
    """Copy CLIP weights into `clip`, resizing the image position table; entries the model lacks are left out.

    Args:
        clip: the model of `build_clip`.
        state: tensors with OpenAI's names.
        grid: rows and columns of patches of `clip`.
        source: what to call the file in an error message.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    wanted = clip.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in wanted}
    table = "visual.positional_embedding"
    if table in fitting and fitting[table].shape != wanted[table].shape:
        fitting[table] = resize_pos_embed(fitting[table], *grid)
    load_state_dict_strictly(clip, fitting, source=source)


def resize_pos_embed(posemb: Tensor, height: int, width: int) -> Tensor:
    """Resize a table of image positions from a square grid to `height` x `width` patches, bilinear, no antialias.

    Args:
        posemb: `[1 + g * g, w]`: the class position, then a square grid row by row.
        height: rows of the new grid.
        width: columns of the new grid.

    Returns:
        `[1 + height * width, w]` in the dtype of `posemb`.

    Raises:
        CheckpointError: the source grid is not square.
    """
    side = int((len(posemb) - 1) ** 0.5)
    if side < 1 or side * side != len(posemb) - 1:
        raise CheckpointError(
            f"The image position table of the start weights has {len(posemb)} rows, which is not one more than a square "
            f"number, so it cannot be resized to {height} x {width} patches: use CLIP weights of a square image size."
        )
    patches = posemb[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, w, g, g)
    patches = F.interpolate(patches, size=(height, width), mode="bilinear", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(height * width, -1)  # (height * width, w)
    return torch.cat([posemb[:1], patches])


def image_tokens(clip: CLIP, images: Tensor) -> Tensor:
    """All image tokens in the joint space.

    Args:
        clip: the model of `build_clip`.
        images: `[B, 3, H, W]`, any float dtype.

    Returns:
        `[B, 1 + P, D]`: the class token, then the patches row by row.
    """
    visual = cast(VisionTransformer, clip.visual)
    patches = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # (B, P, w)
    # Sizes as `shape[0]`, not `len`: an exported model takes batches of every size.
    first = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
    tokens = torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
    tokens = visual.transformer(visual.ln_pre(tokens))
    return visual.ln_post(tokens) @ visual.proj


def text_tokens(clip: CLIP, ids: Tensor) -> Tensor:
    """All text tokens in the joint space, those after the end token included.

    Args:
        clip: the model of `build_clip`.
        ids: `[B, L]` token ids, L at most the context length.

    Returns:
        `[B, L, D]`.
    """
    length = ids.shape[1]
    # The residual stream has the dtype of the blocks' weights (the tables stay float32 in a half-precision model).
    dtype = clip.transformer.get_cast_dtype()
    words = cast(nn.Embedding, clip.token_embedding)(ids)
    positions = cast(Tensor, clip.positional_embedding)[:length]
    causal = cast(Tensor, clip.attn_mask)[:length, :length]
    tokens = clip.transformer(words.to(dtype) + positions.to(dtype), attn_mask=causal)
    return cast(nn.Module, clip.ln_final)(tokens) @ cast(Tensor, clip.text_projection)
