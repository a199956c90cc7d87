"""
MISO-succ on responses distilled with their thinking (paper, section 5.2): the input, instruction and thinking, is cut into
successive chunks; the response is the output.

    accelerate launch examples/train_r1_distill.py --config examples/configs/llama3_8b_r1_succ.yaml

Other data sets need the names of their columns. With thinking and answer in one text, for instance:

    accelerate launch examples/train_r1_distill.py --config examples/configs/llama3_8b_r1_succ.yaml \
        --dataset_name open-r1/OpenR1-Math-220k \
        --instruction_column problem --response_column generations --thinking_column none

Look at the rows first with `trl-miso preview`, which takes the same options: published code disagrees on which column holds the
answer. Other options, and `--dry_run`, are those of train_crab.py.
"""

from trl_miso.cli.preview import dry_run
from trl_miso.recipe import make_trainer, parse_recipe, train


def main() -> None:
    recipe, args, model_args = parse_recipe(source="r1_distill")
    if recipe.dataset_name is None:
        raise ValueError(
            "Got no dataset_name, expected rows with an instruction, thinking and a response. Fix: set --dataset_name, or "
            "--config examples/configs/llama3_8b_r1_succ.yaml."
        )
    if recipe.dry_run:
        dry_run(recipe, args, model_args)
    else:
        train(make_trainer(recipe, args, model_args), recipe)


if __name__ == "__main__":
    main()
