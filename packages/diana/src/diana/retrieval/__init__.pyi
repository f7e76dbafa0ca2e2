from .dialogues import encode_dialogues as encode_dialogues
from .dialogues import encode_turns as encode_turns
from .evaluation import Evaluation as Evaluation
from .evaluation import evaluate as evaluate
from .images import encode_images as encode_images
from .scores import score_rows_of as score_rows_of
