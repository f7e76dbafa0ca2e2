from .network import Retrieval as Retrieval
from .settings import ModelSettings as ModelSettings
from .weights import interpolate_relative_pos_embed as interpolate_relative_pos_embed
