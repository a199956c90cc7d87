"""What a model makes of instructions with constraints: benchmarks, scored as their authors do, beside the paper's numbers."""
