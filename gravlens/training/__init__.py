"""Fine-tune with dense early checkpoints, and monitor a run along directions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
