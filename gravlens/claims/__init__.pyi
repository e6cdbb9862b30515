from . import claim as claim
from . import criteria as criteria
from . import tradeoff as tradeoff
