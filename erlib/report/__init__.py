"""What came out: the papers' figures and tables, our own, and all of it on one page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
