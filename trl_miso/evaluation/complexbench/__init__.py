"""ComplexBench (arXiv 2407.03978): 1,150 instructions, each with questions to a judge and rules, scored as its authors do."""
