"""`trl-miso eval`: score responses to a benchmark."""

from importlib import import_module

from trl_miso.recipes import did_you_mean

_BENCHMARKS = {
    "ifeval": ("trl_miso.cli.eval_ifeval", "541 prompts with instructions that a program checks"),
    "ifeval_flatten": ("trl_miso.cli.eval_ifeval_flatten", "the same with one instruction per prompt, 834 prompts"),
    "ifbench": ("trl_miso.cli.eval_ifbench", "300 prompts with 58 other kinds of instruction, checked alike"),
    "multi_if": ("trl_miso.cli.eval_multi_if", "909 conversations of three turns, each with further instructions"),
    "complexbench": ("trl_miso.cli.eval_complexbench", "1,150 instructions, scored by a judge and by rules"),
}
_HELP = "usage: trl-miso eval BENCHMARK ...\n\n" + "\n".join(
    f"  {name:14} {about}" for name, (_, about) in _BENCHMARKS.items()
)


def main(arguments: list[str]) -> None:
    """Run the command. The first argument is the benchmark."""
    name = arguments[0] if arguments else ""
    if name in ("", "-h", "--help"):
        print(_HELP)
        raise SystemExit(0)
    if name not in _BENCHMARKS:
        suggestion = did_you_mean(name, list(_BENCHMARKS))
        raise SystemExit(
            f"trl-miso eval: got benchmark {name!r}, expected one of {', '.join(_BENCHMARKS)}.{suggestion}"
        )
    import_module(_BENCHMARKS[name][0]).main(arguments[1:])
