from .config import DiaNAConfig as DiaNAConfig
from .diana import DiaNAModel as DiaNAModel
from .diana import DiaNAOutput as DiaNAOutput
from .diana import load_diana as load_diana
from .refiner import AttributeRefiner as AttributeRefiner
