"""Steer, ablate, clamp and patch the residual stream, and measure the causal effect."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
