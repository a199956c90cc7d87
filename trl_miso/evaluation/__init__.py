"""Standard inference and its scores: responses of a model, and the scorers of IFEval, IFEval-Flatten, IFBench, Multi-IF and ComplexBench.

Responders: `inference` (a file of responses, through `backends`) and `in_training` (the model under training, for `callback`).
Scorers: `ifeval`, `flatten`, `ifbench`, `multi_if`, `complexbench`. `table` sets scores beside the paper's numbers.
"""
