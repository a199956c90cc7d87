"""What training will see: prepared rows and statistics as plain data, and their renderings."""

from trl_miso.preview.prepared import preview_dataset

__all__ = ["preview_dataset"]
