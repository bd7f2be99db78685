"""Experts that are experts: one trained per cluster, and what it is worth to be routed to the right one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
