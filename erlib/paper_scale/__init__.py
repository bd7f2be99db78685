"""Eight H100s that nobody has at hand: in virtual time, in real time, and how far that can be trusted."""
