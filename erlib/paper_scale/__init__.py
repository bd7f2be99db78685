"""Eight H100s that nobody has at hand: in virtual time, in real time, and how far that can be trusted."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
