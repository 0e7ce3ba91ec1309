"""Several trainings by one command: leagues, which rank models, and sweeps, which rank settings."""
