"""The documentation: what is written (`models/`, `pages/`), what was measured (`measured/`), and the code
that joins them with what recipes and signatures say."""
