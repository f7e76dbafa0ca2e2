"""Constants that both the model and its training use."""

IMAGE_TOKEN = "<|image|>"
"""Stands in a caption after each phrase that has a reference image. FastComposer's and DP's inference name it so; the
default of the released training class is an empty string, for which padding would count as image tokens."""

DENOISE_MASK_PROB = 0.73
"""Probability with which a batch's denoising loss is masked (hard-coded in the released code)."""

BASE_MODEL = "runwayml/stable-diffusion-v1-5"
BASE_MODEL_SUCCESSOR = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Where the files of `BASE_MODEL` live since that repository was removed from the hub."""

IMAGE_ENCODER = "openai/clip-vit-large-patch14"
