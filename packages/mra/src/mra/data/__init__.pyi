from .datasets import FinetuneDataset as FinetuneDataset
from .datasets import PretrainDataset as PretrainDataset
from .datasets import RetrievalTestDataset as RetrievalTestDataset
from .regions import region_attention as region_attention
from .transforms import RandomErasing as RandomErasing
from .transforms import build_transforms as build_transforms
