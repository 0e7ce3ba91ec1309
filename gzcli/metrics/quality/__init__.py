"""What the metrics of `gz bench` compute. Their records are in `metric.py`."""
