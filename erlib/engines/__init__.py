"""What answers, on a laptop: arithmetic of a configuration, its engine, what its format costs."""
