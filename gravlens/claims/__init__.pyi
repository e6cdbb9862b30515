from . import claim as claim
from . import criteria as criteria
from . import tradeoff as tradeoff
from .claim import Claim as Claim
from .criteria import Demand as Demand
from .criteria import Evidence as Evidence
from .tradeoff import at_equal_task_loss as at_equal_task_loss
