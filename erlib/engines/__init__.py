"""What answers, on a laptop: arithmetic of a configuration, its engine, what its format costs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
