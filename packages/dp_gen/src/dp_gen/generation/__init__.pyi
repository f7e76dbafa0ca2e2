from .produce import Producer as Producer
from .produce import Sampling as Sampling
from .tasks import EditTask as EditTask
from .tasks import NewTask as NewTask
