"""asv benchmarks of xce: loss x shape x dtype x what is returned. `common.LOSSES` is the table of losses."""
