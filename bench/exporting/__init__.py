"""Encoders in the layouts of other programs, one file a layout; ``bench/export.py`` writes them."""
