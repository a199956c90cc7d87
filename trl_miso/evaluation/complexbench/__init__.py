"""ComplexBench (arXiv 2407.03978): 1,150 instructions, scored as its authors do, by a judge's answers and by rules."""
