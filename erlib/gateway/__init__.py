"""The papers' routing gateway, a process of its own: ``python -m erlib.gateway``."""
