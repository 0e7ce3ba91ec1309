"""gz: train, sample, score and compare every kind of image generative model from YAML recipes."""

__version__ = "0.1.0"
