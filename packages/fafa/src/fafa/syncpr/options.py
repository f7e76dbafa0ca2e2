"""The flags of `fafa-syncpr` and its stages. Nothing heavy is imported to print a help text."""

import argparse
from typing import Any

from fafa.syncpr.prompts import IMAGE_TEMPLATE
from tbps_common.pipeline import add_shard_flags, request_fields
from tbps_common.run.arguments import HelpFormatter, add_bad_images_flag, number, whole_number

DESCRIPTION = """\
Make training data for composed person retrieval, as the paper made SynCPR: texts by a chat model, pictures by a
text-to-image model, filters, and the annotation file that fafa-train reads.

  fafa-syncpr quadruples --out syncpr ...   captions of one person in two pictures, and the edits between them
  fafa-syncpr images     --out syncpr ...   the pictures, side by side, cut into reference and target
  fafa-syncpr filter     --out syncpr ...   scores, thresholds, and questions to a vision-language model
  fafa-syncpr pack       --out syncpr ...   SynCPR.json

  fafa-syncpr pairs      --out pairs ...    training pictures for the LoRA: two views of one person, side by side
  fafa-syncpr lora       --out lora ...     a LoRA that makes the text-to-image model draw one person twice
  fafa-syncpr cost                          GPU-hours and disk space at the paper's sizes, or at yours

Every stage can be killed and run again, and --shard i/n spreads it over n machines or GPUs that share the folder.
"""

_QUADRUPLES = """\
Let a chat model of any OpenAI-compatible server write quadruples: two captions of one person in different pictures, and
the edits from one to the other and back.

  export OPENAI_API_KEY=...
  fafa-syncpr quadruples --out syncpr --base-url http://localhost:8000/v1 --model Qwen/Qwen2.5-72B-Instruct \\
    --count 140500 --workers 64

Who the people are is drawn from seed lists (--attributes), reproducibly by --seed. Answers are checked, unusable ones are
asked again, captions that occurred before are dropped. Everything is written to disk immediately: after a kill, the same
command continues. Writes requests.jsonl (the answers), quadruples.jsonl, quadruples.jsonl.dropped.jsonl (with reasons) and a
manifest. Exit status 0 when there are --count quadruples.
"""

_IMAGES = """\
Make the pictures of the quadruples with any text-to-image model of diffusers. Each picture shows the person twice, side by
side; it is cut into a left half (caption 1, the reference) and a right half (caption 2, the target).

  fafa-syncpr images --out syncpr --model black-forest-labs/FLUX.1-dev --lora lora/pytorch_lora_weights.safetensors \\
    --variants 10 --batch-size 4 --shard 1/8

Writes testK/img/<quadruple>-<variant>.png, the halves in testK/sub_img/img_left and img_right, images.jsonl and a
manifest. A picture depends on --seed, quadruple and variant, not on batch or shard. After a kill, the same command continues;
--variants may be raised later. One process per GPU: --device cuda:N --shard i/n.
"""

_FILTER = """\
Keep the pairs that show what they should.

  fafa-syncpr filter --out syncpr --clip openai/clip-vit-large-patch14
  fafa-syncpr filter --out syncpr --clip openai/clip-vit-large-patch14 --min-identity 0.8 \\
    --vlm-base-url http://localhost:8000/v1 --vlm-model Qwen/Qwen2.5-VL-7B-Instruct

Measured for every pair (scores.jsonl): the cosine of each half and its caption, the similarity of the two halves as
persons (--person-model, or CLIP) and as pictures. A pair whose halves are nearly the same picture is of no use either. The
vision-language model is asked only about pairs that pass the thresholds. What passes everything is in kept.jsonl, the rest with
the reason in kept.jsonl.dropped.jsonl. Scores and answers are computed once: other thresholds take effect immediately. The
paper names neither its filter models nor its thresholds; these are ours, so look at scores.jsonl before you choose.
"""

_PACK = """\
Write SynCPR.json from kept.jsonl; then train with it:

  fafa-syncpr pack --out syncpr --both-directions
  python src/blip_fine_tune_new.py --dataset cpr --syncpr-data-path syncpr --json-path SynCPR.json ...

Each pair gives one triplet (left picture, edit, right picture), with --both-directions a second one from right to left.
Triplets with equal cpr_id are positives of each other in training: --id-by quadruple gives all variants of a quadruple one
id per direction, --id-by image every pair its own.
"""

_PAIRS = """\
Put two pictures of one person side by side, with the prompt that `fafa-syncpr images` would use:

  fafa-syncpr pairs --out pairs --syncpr data/SynCPR          (triplets with captions, in SynCPR's layout)
  fafa-syncpr lora --out lora --data pairs --model black-forest-labs/FLUX.1-dev

Writes pairs/images/<number>.png and pairs/captions.jsonl. Any folder with such a file trains a LoRA; one line of it is
{"image": "images/0.png", "caption": "A side-by-side pair of ..."}.
"""

_LORA = """\
Train a LoRA on the attention of a text-to-image model (Stable Diffusion 1 and 2, Flux) with pictures and captions:

  fafa-syncpr lora --out lora --data pairs --model black-forest-labs/FLUX.1-dev --steps 2000 --batch-size 4
  torchrun --nproc_per_node=4 -m fafa.syncpr lora --out lora ...      (four GPUs, each with a batch of its own)

DATA/captions.jsonl has one line {"image": "images/0.png", "caption": "..."} per picture; `fafa-syncpr pairs` makes such a
folder. Writes lora/pytorch_lora_weights.safetensors, which `fafa-syncpr images --lora` and diffusers load, lora/log.jsonl,
and the state to resume from: after a kill the same command ends with the same weights. --steps may be raised later.
"""

_COST = """\
Compute GPU-hours and disk space of the stages. Every assumption is a flag: put in what you measure (each stage prints its
items per second, and its manifest holds the seconds).

  fafa-syncpr cost                                        the paper's sizes
  fafa-syncpr cost --quadruples 10000 --picture-tflops 2100 --gpu-tflops 150

A picture of FLUX.1-dev of 384 x 384 takes 28 steps of 576 picture and 512 text tokens. A token passes 6.5 of the 12 billion
parameters (the others are the other stream's, or work once per picture): 2 x 6.46e9 x 1,088 = 14.1 Tflop per step, and 0.8
for the attention; 28 x 14.9 = 417 Tflop, and 6 for the text encoder and the auto-encoder: about 425.
"""

_DTYPES = ("auto", "float32", "float16", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `fafa-syncpr`; `stage` of its result is the stage's name."""
    parser = argparse.ArgumentParser(
        prog="fafa-syncpr", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name, (add_flags, summary, description) in _STAGES.items():
        stage = stages.add_parser(
            name, help=summary, description=description, formatter_class=HelpFormatter, allow_abbrev=False
        )
        if name != "cost":
            stage.add_argument("--out", required=True, help="folder that the stage writes to")
        if name in ("quadruples", "images", "filter"):
            add_shard_flags(stage)
        if name in ("images", "filter", "lora"):
            stage.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
            stage.add_argument("--dtype", choices=_DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")
        add_flags(stage)
    return parser


def _quadruples(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", "--base_url", help="address up to /v1; None: OPENAI_BASE_URL, or else OpenAI's own"
    )
    server.add_argument("--model", default="Qwen/Qwen2.5-72B-Instruct", help="name of the model on the server")
    server.add_argument(
        "--api-key-env", "--api_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key"
    )
    server.add_argument("--workers", type=whole_number(1), default=8, help="requests in flight")
    _add_request_flags(server, max_tokens=4096)
    what = parser.add_argument_group("quadruples")
    what.add_argument("--count", type=whole_number(1), default=1000, help="total number of quadruples, over all shards")
    what.add_argument("--per-request", type=whole_number(1), default=5, help="quadruples per request")
    what.add_argument("--temperature", type=number(0), default=1.0, help="sampling temperature of the chat model")
    what.add_argument("--seed", type=whole_number(0), default=0, help="random seed of the attribute combinations")
    what.add_argument("--attributes", metavar="FILE", help="seed lists in the form of fafa/syncpr/attributes.json")
    what.add_argument("--tries", type=whole_number(1), default=3, help="questions per request with unusable answers")
    what.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue with the quadruples that are there; --no-resume refuses a folder that has some",
    )
    what.add_argument("--dry-run", action="store_true", help="show the first prompts and send nothing")


def _images(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    _add_diffusion_model(model)
    model.add_argument("--lora", help="LoRA in diffusers' format: file, folder or hub name")
    model.add_argument("--lora-scale", type=number(0), default=1.0, help="weight of the LoRA; 1: as trained")
    picture = parser.add_argument_group("pictures")
    picture.add_argument("--variants", type=whole_number(1), default=10, help="pictures per quadruple")
    picture.add_argument("--height", type=whole_number(16), default=384, help="height of the whole picture, in pixels")
    picture.add_argument("--width", type=whole_number(16), default=384, help="width of the whole picture, in pixels")
    picture.add_argument("--half-height", type=whole_number(1), default=384, help="height of the halves after resizing")
    picture.add_argument("--half-width", type=whole_number(1), default=192, help="width of the halves after resizing")
    picture.add_argument("--steps", type=whole_number(1), default=28, help="sampling steps")
    picture.add_argument("--guidance", type=number(0), default=3.5, help="scale of classifier-free guidance")
    picture.add_argument("--negative-prompt", metavar="TEXT", help="negative prompt, for models that take one")
    picture.add_argument(
        "--prompt-template", metavar="TEXT", default=IMAGE_TEMPLATE, help="holds {caption_1} and, after it, {caption_2}"
    )
    picture.add_argument("--seed", type=whole_number(0), default=0, help="random seed of the pictures")
    run_group = parser.add_argument_group("run")
    run_group.add_argument("--batch-size", type=whole_number(1), default=4, help="pictures at a time")
    run_group.add_argument("--folder-size", type=whole_number(1), default=1000, help="quadruples per folder testK")
    run_group.add_argument("--halves-only", action="store_true", help="do not keep the whole pictures in testK/img")


def _filter(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("models")
    model.add_argument(
        "--clip", default="openai/clip-vit-large-patch14", help="folder or hub name of an image-text model"
    )
    model.add_argument("--person-model", help="image model for --min-identity; None: CLIP's picture features")
    thresholds = parser.add_argument_group("thresholds (cosines)")
    thresholds.add_argument("--min-image-text", type=number(-1), default=0.2, help="each half and its caption")
    thresholds.add_argument("--min-identity", type=number(-1), default=0.7, help="left and right half, as persons")
    thresholds.add_argument(
        "--max-pair-similarity", type=number(-1), default=0.97, help="left and right half, as pictures, by CLIP"
    )
    vlm = parser.add_argument_group("vision-language model (optional)")
    vlm.add_argument(
        "--vlm-model", help="name of the model on an OpenAI-compatible server; without it, no questions are asked"
    )
    vlm.add_argument("--vlm-base-url", help="address up to /v1; None: OPENAI_BASE_URL, or else OpenAI's own")
    vlm.add_argument("--vlm-api-key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    vlm.add_argument("--vlm-workers", type=whole_number(1), default=8, help="requests in flight")
    _add_request_flags(vlm, max_tokens=256)
    run_group = parser.add_argument_group("run")
    run_group.add_argument("--batch-size", type=whole_number(1), default=64, help="pairs at a time")
    run_group.add_argument("--workers", type=whole_number(1), default=8, help="threads that read pictures")


def _add_diffusion_model(group: Any) -> None:
    """What is fine-tuned and what makes pictures is named alike."""
    group.add_argument(
        "--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub name of a diffusers model"
    )
    group.add_argument("--revision", help="revision of the model on the hub")


def _add_request_flags(group: Any, *, max_tokens: int) -> None:
    """What both stages that ask a chat model share."""
    group.add_argument("--timeout", type=number(0, above=True), default=120.0, help="seconds for one answer")
    group.add_argument(
        "--deadline",
        type=number(0, above=True),
        default=1200.0,
        help="seconds for one request with all its repetitions",
    )
    group.add_argument("--max-retries", type=whole_number(0), default=6, help="repetitions after errors of the server")
    group.add_argument(
        "--max-tokens", "--max_tokens", type=whole_number(1), default=max_tokens, help="longest answer, in tokens"
    )
    group.add_argument(
        "--request-fields",
        type=request_fields,
        metavar="JSON",
        help='fields of the request to add or change, null to leave one out: {"reasoning_effort": "low"}',
    )


def _pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--both-directions", action="store_true", help="also from the right picture to the left one")
    parser.add_argument(
        "--id-by", choices=("quadruple", "image"), default="quadruple", help="which triplets share a cpr_id"
    )
    parser.add_argument("--json-path", default="SynCPR.json", help="file to write, relative to --out or absolute")
    parser.add_argument(
        "--preview", type=whole_number(0), default=8, help="triplets to show in preview.png; 0: no picture"
    )


def _pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--syncpr", required=True, metavar="ROOT", help="folder with pictures and an annotation")
    parser.add_argument("--json-path", default="SynCPR.json", help="annotation, relative to --syncpr or absolute")
    parser.add_argument("--height", type=whole_number(16), default=384, help="height of the whole picture, in pixels")
    parser.add_argument("--width", type=whole_number(16), default=384, help="width of the whole picture, in pixels")
    parser.add_argument("--limit", type=whole_number(1), help="make at most this many pairs")
    parser.add_argument("--prompt-template", metavar="TEXT", default=IMAGE_TEMPLATE, help="as for fafa-syncpr images")


def _lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with captions.jsonl and its pictures")
    _add_diffusion_model(parser)
    parser.add_argument("--rank", type=whole_number(1), default=16, help="rank of the LoRA matrices")
    parser.add_argument("--steps", type=whole_number(1), default=2000, help="optimizer steps of the whole training")
    parser.add_argument("--batch-size", type=whole_number(1), default=4, help="pictures per step and process")
    parser.add_argument("--learning-rate", type=number(0, above=True), default=1e-4, help="learning rate of AdamW")
    parser.add_argument("--warmup", type=whole_number(0), default=100, help="steps in which the rate rises")
    parser.add_argument("--height", type=whole_number(16), default=384, help="pictures are resized to it")
    parser.add_argument("--width", type=whole_number(16), default=384, help="pictures are resized to it")
    parser.add_argument(
        "--caption-dropout", type=number(0, 1), default=0.1, help="share of empty captions, for guidance"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--save-every", type=whole_number(1), default=200, help="steps between two saves")
    parser.add_argument("--log-every", type=whole_number(1), default=20, help="steps between two lines of the log")
    parser.add_argument("--num-workers", type=whole_number(0), default=2, help="processes that load pictures")
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="random seed of the order, the noise and the initial weights"
    )
    add_bad_images_flag(parser)


def _cost(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("size (the paper's; 10 pictures per quadruple are inferred)")
    size.add_argument("--quadruples", type=whole_number(1), default=140_500, help="texts")
    size.add_argument("--variants", type=whole_number(1), default=10, help="pictures per quadruple")
    size.add_argument("--kept", type=number(0), default=1_150_000 / 2_810_000, help="share of pairs that is kept")
    texts = parser.add_argument_group("texts (assumed)")
    texts.add_argument("--per-request", type=whole_number(1), default=5, help="quadruples per request")
    texts.add_argument(
        "--answer-tokens", type=whole_number(1), default=950, help="tokens per answer: 190 per quadruple"
    )
    texts.add_argument(
        "--tokens-per-second",
        type=number(0, above=True),
        default=2000.0,
        help="throughput of a 72B model with many requests at once",
    )
    texts.add_argument("--text-gpus", type=whole_number(1), default=4, help="GPUs that hold the chat model")
    pictures = parser.add_argument_group("pictures (assumed)")
    pictures.add_argument(
        "--picture-tflops", type=number(0, above=True), default=425.0, help="operations of one picture"
    )
    pictures.add_argument(
        "--gpu-tflops",
        type=number(0, above=True),
        default=400.0,
        help="reached per second: 40 %% of an H100's peak in bf16",
    )
    pictures.add_argument("--lora-steps", type=whole_number(0), default=2000, help="training steps of the LoRA")
    pictures.add_argument("--lora-batch", type=whole_number(1), default=4, help="pictures per step")
    filters = parser.add_argument_group("filters (assumed)")
    filters.add_argument("--clip-gflops", type=number(0, above=True), default=162.0, help="one half in CLIP ViT-L/14")
    filters.add_argument(
        "--asked", type=number(0), default=0.6, help="share of pairs that the vision-language model is asked about"
    )
    filters.add_argument(
        "--answers-per-second",
        type=number(0, above=True),
        default=15.0,
        help="throughput of a 7B vision-language model",
    )
    disk = parser.add_argument_group("disk (assumed)")
    disk.add_argument(
        "--picture-kb", type=number(0), default=250.0, help="one whole picture as PNG; its halves take as much"
    )


_STAGES = {
    "quadruples": (_quadruples, "captions and edits from a chat model", _QUADRUPLES),
    "images": (_images, "pictures from a text-to-image model", _IMAGES),
    "filter": (_filter, "scores and thresholds", _FILTER),
    "pack": (_pack, "the annotation file", _PACK),
    "pairs": (_pairs, "side-by-side training pictures for the LoRA", _PAIRS),
    "lora": (_lora, "fine-tune the text-to-image model", _LORA),
    "cost": (_cost, "GPU-hours and disk space, by arithmetic", _COST),
}
