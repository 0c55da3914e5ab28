"""Checkpoints: one file a layout, and ``load.py``, which recognises them."""
