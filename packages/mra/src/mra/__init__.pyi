from .config import load_config as load_config
from .data.datasets import FinetuneDataset as FinetuneDataset
from .data.datasets import PretrainDataset as PretrainDataset
from .data.datasets import RetrievalTestDataset as RetrievalTestDataset
from .data.regions import region_attention as region_attention
from .data.transforms import RandomErasing as RandomErasing
from .data.transforms import build_transforms as build_transforms
from .model.network import Retrieval as Retrieval
from .model.weights import interpolate_relative_pos_embed as interpolate_relative_pos_embed
from .optimizer import create_optimizer as create_optimizer
from .optimizer import lr_multiplier as lr_multiplier
from .optimizer import param_groups as param_groups
from .retrieval.encode import encode_images as encode_images
from .retrieval.encode import encode_texts as encode_texts
from .retrieval.metrics import retrieval_metrics as retrieval_metrics
from .retrieval.rerank import itm_rerank as itm_rerank
from .text.augmentation import eda as eda
from .text.augmentation import pre_caption as pre_caption
from .text.tokens import TextMaskingGenerator as TextMaskingGenerator
from .text.tokens import build_tokenizer as build_tokenizer
from .text.tokens import mlm_batch as mlm_batch
from .text.tokens import tokenize as tokenize

__version__: str
