from . import control_vectors as control_vectors
from . import inspect_logs as inspect_logs
