from . import finetune as finetune
from . import monitor as monitor
from . import thresholds as thresholds
from .thresholds import Threshold as Threshold
from .thresholds import calibrate as calibrate
