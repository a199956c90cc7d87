"""`trl-miso eval`."""

from importlib import import_module

_BENCHMARKS = {
    "ifeval": ("trl_miso.cli.eval_ifeval", "541 prompts with instructions that a program checks"),
    "ifeval_flatten": ("trl_miso.cli.eval_ifeval_flatten", "the same instructions one by one, 834 prompts"),
    "complexbench": ("trl_miso.cli.eval_complexbench", "1,150 instructions, questions to a judge, rules"),
}
_HELP = "usage: trl-miso eval BENCHMARK ...\n\n" + "\n".join(
    f"  {name:14} {about}" for name, (_, about) in _BENCHMARKS.items()
)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments, the first of which is a benchmark."""
    name = (arguments or [""])[0]
    if name not in _BENCHMARKS:
        wanted = name in ("", "-h", "--help")
        print(_HELP if wanted else f"Got benchmark {name!r}, expected one of {list(_BENCHMARKS)}.\n\n{_HELP}")
        raise SystemExit(0 if wanted else 2)
    import_module(_BENCHMARKS[name][0]).main(arguments[1:])
