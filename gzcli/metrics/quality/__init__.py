"""The metrics of `gz bench`, one file each. `METRICS` are their records."""
