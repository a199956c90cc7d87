"""A miniature of the paper's comparison of methods: a small language, a small model, every method, one table.

In the order of a run:

    study.py         methods, and everything else that determines the tables
    language.py      texts, constraints that can be checked, tokenizer, splits
    pretraining.py   the base model
    training.py      fine-tuning of the base model by one method
    evaluate.py      standard inference: verdicts on answers, attention on the constraints
    grid.py          all runs of a study, with a ledger from which a killed study resumes
    report.py        tables and figure
    run.py           a study from the first step to the written report
"""
