"""
Mixture-of-Contexts (MISO) fine-tuning on multi-constraint instructions: `trl-miso sft`, as a script to copy and change.

Without arguments it trains a small Llama on generated rows in Crab's schema, on a CPU in minutes:

    accelerate launch examples/train_crab.py

`python examples/train_crab.py --help` shows the options. `trl-miso recipes` lists recipes of the paper's experiments, such as
`--config llama3_8b_para`.
"""

import sys

from trl_miso.cli.main import run

if __name__ == "__main__":
    run("sft", sys.argv[1:])
