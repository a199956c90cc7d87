"""Tasks for lm-eval's `--include_path`, the folder of this file."""
