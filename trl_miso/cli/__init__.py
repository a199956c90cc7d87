"""The console commands: argument parsing and printing. This room may import every other room; no other room imports it."""
