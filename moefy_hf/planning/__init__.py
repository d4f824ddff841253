"""`plan`: how fast a model becomes at which quality, or that it is not worth it."""
