"""
MISO-succ on responses distilled with their thinking (paper, section 5.2): the input, instruction and thinking, is cut into
successive chunks; the response is the output.

    accelerate launch examples/train_r1_distill.py --config llama3_8b_r1_succ

Other data sets need the names of their columns. With thinking and answer in one text, for instance:

    accelerate launch examples/train_r1_distill.py --config llama3_8b_r1_succ \
        --dataset open-r1/OpenR1-Math-220k \
        --instruction_column problem --response_column generations --thinking_column none

Look at the rows first with `trl-miso preview`, which takes the same options: published code disagrees on which column holds the
answer.
"""

import sys

from trl_miso.cli.main import run

if __name__ == "__main__":
    run("sft", ["--source", "r1_distill", *sys.argv[1:]])
