"""DaD, the making of SDA: a text-to-image model aligned with the target data set, and what its pictures become.

Five stages that meet in files (paper, section on SDA; no code of the authors' is published):

    finetune   a diffusion model learns the look of the training set
    generate   twenty pictures per caption            -> generated.jsonl, images
    filter     greyscale and malformed ones go        -> filtered.jsonl
    caption    every picture is described anew        -> captioned.jsonl
    regions    boxes with phrases                     -> regions.jsonl, sda_<a>_<b>.json

`mra-dad` is the command line. Nothing outside this folder imports it, and diffusers and peft are imported nowhere else.
"""
