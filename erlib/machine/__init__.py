"""This machine: its hardware, processes that end with us, folders that do, too, and how far something is."""
