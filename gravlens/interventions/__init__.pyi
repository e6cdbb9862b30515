from . import edits as edits
from . import effects as effects
from . import hooks as hooks
from . import orthogonalize as orthogonalize
from . import patching as patching
from . import readout as readout
from . import refusal as refusal
