"""Adapters from published (and synthetic) data sets to the columns trl_miso trains on, one module each.

A source is a function of a row, with the types of its columns beside it; it maps data sets on disk and streams alike:

    dataset.map(crab_row, remove_columns=dataset.column_names, features=crab_features())
    dataset.map(sharegpt_row, remove_columns=dataset.column_names, features=sharegpt_features())
    dataset.map(r1_distill_row, remove_columns=dataset.column_names, features=r1_distill_features())

| source | data sets on the Hub | columns it gives, with `miso_status` |
| --- | --- | --- |
| `crab` | THU-KEG/Crab-SFT (ShareGPT is mixed in) | `prompt`, `constraints`, `completion`, `full_prompt` |
| `sharegpt` | anon8231489123/ShareGPT_Vicuna_unfiltered, and its like | `messages` |
| `r1_distill` | tuanha1305/DeepSeek-R1-Distill, open-r1/OpenR1-Math-220k, and their like | `prompt`, `completion` |

| `miso_status` | `split` and, with one context | and, where the row will be dropped |
| --- | --- | --- |
| `crab` | `no_constraints`, `plain`, `reverse`, `fewshot` | `bad_messages` |
| `sharegpt` | | `empty`, `no_user`, `no_assistant`, `unknown_role ...` |
| `r1_distill` | `no_thinking` | `no_instruction`, `no_response`, `swapped columns? ...` |

`synthetic` makes rows in Crab's schema, and a toy model, without any download.
"""
