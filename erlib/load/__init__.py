"""Measuring: simulated users, resumable sweeps, the record of each request, and what follows from records."""
