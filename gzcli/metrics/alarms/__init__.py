"""Alarms without training: methods that are fitted to good images in seconds, and their calibration."""
