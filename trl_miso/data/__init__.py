"""Raw rows to one packed batch. The journey of a row, one file per step:

1. `schema`: the columns decide the row's format, and its values are checked.
2. `contexts`: the row becomes contexts and a completion.
3. `chat_template`: conversations become text, and no turn gets lost (`plain_templates` saves most renderings).
4. `tokenization`: text becomes token ids, with the boundary between contexts and output.
5. `layout`: ids become an example: weights, chunks, truncation, draws.
6. `preparation` (or `sft_rows`, for rows that TRL prepares): batches of rows become columns; `dropped` counts the rest.
7. `bins`: examples are packed.
8. `collator`: prepared rows become one flat batch.

`pipeline` is the one door from a dataset to prepared rows; `options` are the settings it reads, `sft_settings` refuses those
of SFTTrainer that rows do not allow, `mapping` maps datasets and streams alike, `token_text` says what a token stands for.
"""
