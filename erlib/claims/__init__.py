"""What the papers claim, checked against records."""
