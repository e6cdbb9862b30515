from . import finetune as finetune
from . import monitor as monitor
from . import recipe as recipe
from . import thresholds as thresholds
