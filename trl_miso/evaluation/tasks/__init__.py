"""Task files for lm-eval: pass this folder as `--include_path`."""
