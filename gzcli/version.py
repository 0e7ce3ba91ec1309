"""The version, in its own file that imports nothing."""

__version__ = "0.2.0"
