"""The paper's comparison of methods on a real model: rows made on the spot, every method, tests by standard inference.

In the order of a run:

    study.py         methods and sizes: everything that determines the tables
    constraints.py   constraints that an answer satisfies, by lm-eval's checkers
    rows.py          prompts, answers, rows, splits
    decoding.py      batches that answers leave once they end
    signals.py       training signals on trial: both, distill, misses, anneal
    training.py      fine-tuning by one method
    sets.py          published prompts that test a model, and their scorers
    evaluate.py      standard inference: verdicts, faults of answers, attention on the constraints
    grid.py          all runs, with ledgers from which a killed study resumes
    report.py        tables
"""
