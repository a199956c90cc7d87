"""The miniature study of `mini_repro.py`."""
