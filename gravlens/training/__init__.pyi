from . import finetune as finetune
from . import monitor as monitor
from . import thresholds as thresholds
