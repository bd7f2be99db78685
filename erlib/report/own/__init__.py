"""Figures of our own, which the papers have no counterpart of."""
