"""What came out: the papers' figures and tables, our own, and all of it on one page."""
