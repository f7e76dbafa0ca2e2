"""`dp-make-tiny OUT`: tiny models under the names that the paper's commands use."""

import argparse

from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, whole_number
from tbps_world.tiny.dp_gen import UNET_WIDTH, read_lexicon, write_tiny_models

VAE_UPDATES = 200


def main(argv: list[str]) -> int:
    """Write the models.

    Raises:
        InputError: the lexicon or the images cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="dp-make-tiny",
        description="Write a tiny random Stable Diffusion and a tiny random CLIP into OUT/runwayml/stable-diffusion-v1-5\n"
        "and OUT/openai/clip-vit-large-patch14. Model names are tried as folders of the working directory first, so\n"
        "the paper's commands, run in OUT, use them: no download, no GPU. With --vae_images the VAE learns to paint\n"
        "such images, so that generated pictures are more than noise.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", help="folder to write into")
    parser.add_argument("--lexicon", metavar="FILE", help="words of the captions (default: the synthetic world's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--unet_width", type=whole_number(4), default=UNET_WIDTH, help="channels of its first stage")
    parser.add_argument("--vae_images", metavar="DIR", help="training folder on whose images the VAE is trained")
    parser.add_argument("--vae_updates", type=whole_number(1), default=VAE_UPDATES, help="updates of that training")
    parser.add_argument("--vae_resolution", type=whole_number(64), default=128, help="resolution of that training")
    args = parser.parse_args(argv)
    if args.unet_width % 4:
        raise InputError(f"--unet_width {args.unet_width} is not a multiple of 4, the number of normalisation groups")
    if args.vae_resolution % 8:
        raise InputError(
            f"--vae_resolution {args.vae_resolution} is not a multiple of 8: the VAE halves it three times"
        )
    words = read_lexicon(args.lexicon)
    images = None
    if args.vae_images:
        from tbps_world.tiny.dp_gen_vae import train_images

        images = train_images(args.vae_images, args.vae_resolution)
    sizes = {"unet_width": args.unet_width, "vae_images": images, "vae_updates": args.vae_updates}
    for folder in write_tiny_models(args.out, words, args.seed, **sizes):
        print(f"written: {folder}")
    return 0
