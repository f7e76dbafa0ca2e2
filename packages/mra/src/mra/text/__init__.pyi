from .augmentation import eda as eda
from .augmentation import pre_caption as pre_caption
from .tokens import TextMaskingGenerator as TextMaskingGenerator
from .tokens import build_tokenizer as build_tokenizer
from .tokens import mlm_batch as mlm_batch
from .tokens import tokenize as tokenize
