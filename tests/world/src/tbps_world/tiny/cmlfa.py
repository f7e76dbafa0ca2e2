"""`cmlfa-make-tiny-clip`: a small random CLIP model in OpenAI's layout, so that the paper's flags run on a laptop."""

import argparse

from tbps_common.run.arguments import whole_number

DESCRIPTION = """\
Write a CLIP model of random weights in OpenAI's layout, small enough to train on a laptop:

  cmlfa-make-tiny-clip --out tiny.pt
  python train.py ... --pretrain_choice tiny.pt --img_size 64,32 --text_length 32

The vocabulary stays CLIP's, so that real captions can be read.
"""


def main(argv: list[str]) -> int:
    """Parse, write, say what was written."""
    parser = argparse.ArgumentParser(
        prog="cmlfa-make-tiny-clip", description=DESCRIPTION, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("--out", default="tiny.pt", help="file to write (.pt or .safetensors)")
    parser.add_argument("--width", type=whole_number(64), default=64, help="width of both towers, a multiple of 64")
    parser.add_argument("--layers", type=whole_number(1), default=2, help="layers of both towers")
    parser.add_argument(
        "--embed_dim", type=whole_number(64), default=64, help="width of the joint space, a multiple of 64"
    )
    parser.add_argument("--patch", type=whole_number(1), default=16, help="side of an image patch in pixels")
    parser.add_argument("--grid", type=whole_number(1), default=4, help="side of the square table of image positions")
    parser.add_argument("--context_length", type=whole_number(3), default=32, help="longest text in tokens")
    parser.add_argument("--vocab_size", type=whole_number(4), default=49408, help="rows of the token table")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of the random weights")
    flags = vars(parser.parse_args(argv))
    path = flags.pop("out")
    from tbps_world.tiny.clip import write_tiny_clip

    write_tiny_clip(path, **flags)
    print(f"wrote {path}: {flags['width']} wide, {flags['layers']} layers, {flags['embed_dim']}-d joint space")
    return 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass
