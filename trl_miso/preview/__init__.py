"""Prepared rows and their statistics as plain data, for the terminal and the page."""

from trl_miso.preview.prepared import preview_dataset

__all__ = ["preview_dataset"]
