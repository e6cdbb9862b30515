from . import ablation as ablation
from . import comparison as comparison
from . import evidence as evidence
from . import experiment as experiment
from . import inputs as inputs
from . import inspection as inspection
from . import paired as paired
from . import reproduce as reproduce
