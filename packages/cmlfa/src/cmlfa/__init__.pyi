from .model.cmlfa import CMLFA as CMLFA
from .model.cmlfa import build_model as build_model
from .model.tokenizer import SimpleTokenizer as SimpleTokenizer
from .model.tokenizer import tokenize as tokenize
from .model.weights import load_checkpoint as load_checkpoint
from .options import get_args as get_args

__version__: str
