from .data.check import check_dataset as check_dataset
from .data.dataset import DiversePersonDataset as DiversePersonDataset
from .data.dataset import collate_fn as collate_fn
from .data.transforms import Transform4TestWithSegmap as Transform4TestWithSegmap
from .data.transforms import Transform4TrainWithSegmap as Transform4TrainWithSegmap
from .data.transforms import attribute_transforms as attribute_transforms
from .data.transforms import cut_attribute as cut_attribute
from .generation.sampling import decode_latents as decode_latents
from .generation.sampling import denoise as denoise
from .losses import BalancedL1Loss as BalancedL1Loss
from .losses import attribute_localization_loss as attribute_localization_loss
from .model.attention import supervised_cross_attentions as supervised_cross_attentions
from .model.captions import encode_with_image_tokens as encode_with_image_tokens
from .model.captions import get_img_token_idx as get_img_token_idx
from .model.captions import insert_image_tokens as insert_image_tokens
from .model.captions import load_tokenizer as load_tokenizer
from .model.controller import MLP as MLP
from .model.controller import DiversePersonController as DiversePersonController
from .model.diverse_person import DiversePersonModel as DiversePersonModel
from .model.pipeline import DiversePersonPipeline as DiversePersonPipeline
from .model.weights import load_checkpoint as load_checkpoint
from .model.weights import official_state_dict as official_state_dict
from .optim import build_lr_scheduler as build_lr_scheduler
from .optim import build_optimizer as build_optimizer
from .optim import set_trainable as set_trainable
from .options import DENOISE_MASK_PROB as DENOISE_MASK_PROB
from .options import parse_args as parse_args

__version__: str
IMAGE_TOKEN: str
