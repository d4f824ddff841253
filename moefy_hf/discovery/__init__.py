"""Finding out about a model that nobody described: its FFNs, its towers, a batch that it runs on, its heads."""
