"""One module per array library: see `xce._dispatch` for what a backend is."""
