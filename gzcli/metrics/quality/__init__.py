"""The metrics of `gz bench`, a file each, whose records are `METRICS`."""
