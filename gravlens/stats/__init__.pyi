from . import bootstrap as bootstrap
from . import controls as controls
from . import damage as damage
from . import nulls as nulls
from . import permutation as permutation
from . import reliability as reliability
from . import robustness as robustness
