"""Blockers: hold a fine-tuning run along a direction, a subspace or a behaviour."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
