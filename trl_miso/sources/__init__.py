"""Adapters from published data sets to the columns that trl_miso trains on, one module per source.

A source has a function from row to row, and a function for the types of the resulting columns. Both serve data sets in memory and
streams:

    dataset.map(crab_row, remove_columns=dataset.column_names, features=crab_features())
    dataset.map(sharegpt_row, remove_columns=dataset.column_names, features=sharegpt_features())
    dataset.map(r1_distill_row, remove_columns=dataset.column_names, features=r1_distill_features())

| source | data sets on the Hub | columns besides `miso_status` |
| --- | --- | --- |
| `crab` | THU-KEG/Crab-SFT (which has ShareGPT mixed in) | `prompt`, `constraints`, `completion`, `full_prompt`, `train_turns` |
| `sharegpt` | anon8231489123/ShareGPT_Vicuna_unfiltered and similar ones | `messages` |
| `r1_distill` | tuanha1305/DeepSeek-R1-Distill, open-r1/OpenR1-Math-220k and similar ones | `prompt`, `completion` |
| `tulu_persona` | allenai/tulu-3-sft-personas-instruction-following | `prompt`, `constraints`, `completion`, `full_prompt` |
| `ultraif` | kkk-an/UltraIF-sft-175k and similar ones | `prompt`, `constraints`, `completion`, `full_prompt` |
| `conifer` | ConiferLM/Conifer | `messages`, `train_turns` |
| `alpaca` | tatsu-lab/alpaca, yahma/alpaca-cleaned and similar ones | `prompt`, `completion` |

`miso_status` is `split`, or the reason why a row keeps one context or will be dropped:

| source | one context | dropped |
| --- | --- | --- |
| `crab` | `no_constraints`, `plain`, `reverse`, `fewshot` | `bad_messages` |
| `sharegpt` | | `empty`, `no_user`, `no_assistant`, `unknown_role ...` |
| `r1_distill` | `no_thinking` | `no_instruction`, `no_response`, `swapped columns? ...` |
| `tulu_persona` | `no_constraints`, `not_verbatim` | as `sharegpt` |
| `ultraif` | `no_constraints`, `not_verbatim` | `no_user`, `no_assistant`, `bad_history` |
| `conifer` | `plain` | as `sharegpt` |
| `alpaca` | `plain` | `no_instruction`, `no_output` |

`train_turns` says whose answers of a conversation are trained, `all` or `last`, where the setting `train_turns` is `auto`. Every answer
of `messages` without this column is trained.

`synthetic` generates rows in Crab's schema, a tokenizer and a toy model, without any download.
"""
