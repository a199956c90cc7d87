"""
MISO-succ on responses distilled with their thinking (paper, section 5.2). The input, which is the instruction and the thinking, is
cut into successive chunks. The response is the output.

    accelerate launch examples/train_r1_distill.py --config llama3_8b_r1_succ

For another data set, name its columns. For instance, where one column holds the thinking and the answer:

    accelerate launch examples/train_r1_distill.py --config llama3_8b_r1_succ \
        --dataset open-r1/OpenR1-Math-220k \
        --instruction_column problem --response_column generations --thinking_column none

Look at the rows first, because published code disagrees on which column holds the answer:

    trl-miso preview --source r1_distill --config llama3_8b_r1_succ
"""

import sys

from trl_miso.cli.main import run

if __name__ == "__main__":
    run("sft", ["--source", "r1_distill", *sys.argv[1:]])
