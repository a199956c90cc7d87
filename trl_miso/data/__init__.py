"""Raw rows to one packed batch. The journey of a row, one file per step:

1. `schema`: the columns decide the row's format, and its values are checked. `columns` tells which are not read, `settings`
   refuses settings without an effect on the format.
2. `contexts`, `turns`: the row becomes answers, each with its contexts and a completion (`constraints` takes constraints out
   of a text, and adds them).
3. `chat_template`: conversations become text, and no turn gets lost (`plain_templates` saves most renderings); `boundary`
   finds where the answer begins.
4. `tokenization`: text becomes token ids, with the boundary between contexts and output (`tokenizers` refuses
   tokenizers).
5. `layout`: the answers of a row become an example: weights, chunks, truncation, draws.
6. `preparation` (or `sft_rows`, for rows that TRL prepares): batches of rows become columns; `dropped` counts the rest, and
   `mixed` warns where nothing mixes.
7. `bins`: examples are packed.
8. `collator`: prepared rows become one flat batch.

`pipeline` is the one door from a dataset to prepared rows; `options` are the settings it reads, `sft_settings` refuses those
of SFTTrainer that rows do not allow, `mapping` maps datasets and streams alike, `token_text` says what a token stands for.
"""
