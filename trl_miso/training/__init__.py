"""`MISOSFTTrainer` and its layers.

`trainer` is the method: rows, collator, attention and loss. `reliability` is a Trainer layer that knows no MISO, built on
`checkpoints` (atomic checkpoints), `kept_settings` (what they were trained with), `streams` (where a stream resumes) and
`interruption` (SIGTERM, NaN). `hub` and `model_card` are what is published,
`predictions` turns flat batches back into rows for metrics, `verified` checks before the first step, and `guards`
refuses what would be trained wrongly.
"""
