from . import anchoring as anchoring
from . import blocking as blocking
from . import constrained_sft as constrained_sft
from . import penalty as penalty
from . import projection as projection
from . import steered_training as steered_training
