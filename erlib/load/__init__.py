"""Measuring: simulated users, resumable sweeps, the record of each request, and what follows from records."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
