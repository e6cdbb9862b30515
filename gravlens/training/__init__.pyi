from . import finetune as finetune
from . import monitor as monitor
from . import run_folder as run_folder
from . import thresholds as thresholds
from .finetune import Finetuned as Finetuned
from .thresholds import Threshold as Threshold
from .thresholds import calibrate as calibrate
