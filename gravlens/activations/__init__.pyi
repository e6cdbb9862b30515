from . import contrasts as contrasts
from . import cost as cost
from . import fingerprint as fingerprint
from . import plan as plan
from . import positions as positions
from . import reader as reader
from . import residuals as residuals
from . import store as store
