"""Adapters from published (and synthetic) data sets to the columns trl_miso trains on, one module each."""
