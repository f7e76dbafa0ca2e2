from .attention import AttentionCapture as AttentionCapture
from .attention import supervised_cross_attentions as supervised_cross_attentions
from .controller import MLP as MLP
from .controller import DiversePersonController as DiversePersonController
from .diverse_person import DiversePersonModel as DiversePersonModel
from .pipeline import DiversePersonPipeline as DiversePersonPipeline
from .weights import load_checkpoint as load_checkpoint
from .weights import official_state_dict as official_state_dict
