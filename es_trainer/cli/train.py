"""`es-trainer train`"""

from .help import TRAIN_HELP


def main(argv: list[str]) -> None:
    """Look through the options, then launch `scripts/es.py` with them."""
    if {"-h", "--help"} & set(argv):
        print(TRAIN_HELP.read_text(), end="")
        raise SystemExit(0)
    # Imported here, because it takes seconds
    from ..scripts import es
    from ..scripts.launch import from_yaml, launch

    parser = es.make_parser(prog="es-trainer train")
    if "--help-all" in argv:
        parser.print_help()
        raise SystemExit(0)
    # Errors are found here, before anything is started. On CPU: a GPU's memory is for what is started
    *arguments, in_yaml, in_argv = parser.parse_args_and_config(
        [*argv, "--use_cpu", "true"], return_remaining_strings=True, separate_remaining_strings=True
    )
    es.check(*arguments)
    launch(es.__file__, _without(argv, in_argv), [*from_yaml(in_yaml), *in_argv])


def _without(argv: list[str], left_over: list[str]) -> list[str]:
    """What is left of `argv` without `left_over`, which is a part of it in its order."""
    waiting = iter(left_over)
    following = next(waiting, None)
    kept = []
    for arg in argv:
        if arg == following:
            following = next(waiting, None)
        else:
            kept.append(arg)
    return kept
