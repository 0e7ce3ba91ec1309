"""The documentation: texts (`models/`, `pages/`), measurements (`measured/`), and the code that combines them
with recipes and signatures."""
