"""Who answers: c-BTM's clusterer, other routers, and how they compare."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
