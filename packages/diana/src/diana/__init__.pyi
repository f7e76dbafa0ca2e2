from . import data as data
from . import losses as losses
from . import metrics as metrics
from . import optim as optim
from . import retrieval as retrieval
from . import schedule as schedule
from . import similarity as similarity
from . import tokenizer as tokenizer
from .model import DiaNAConfig as DiaNAConfig
from .model import DiaNAModel as DiaNAModel
from .model import load_diana as load_diana

__version__: str
