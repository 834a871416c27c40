"""The command line: which commands there are, and the parser of each.

A command is a pair of functions in a module that is imported only when the command is chosen: one adds its options to a
parser, the other runs it with what was parsed and a console to write to.
"""

import argparse
import difflib
import importlib
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console


class Command(NamedTuple):
    """Where a command lives, and what it does in a line."""

    module: str
    add_arguments: str  # its (parser) -> None
    run: str  # its (arguments, console) -> int | None; an int is the exit code
    summary: str


DEFAULT = "train"
COMMANDS = {
    "train": Command("mtmd.experiment", "add_arguments", "run", "train from one or more seeds (the default)"),
    "evaluate": Command(
        "mtmd.inference", "add_evaluate_arguments", "run_evaluate", "metrics of a checkpoint, also without modalities"
    ),
    "predict": Command("mtmd.inference", "add_predict_arguments", "run_predict", "scores for own utterances"),
    "ablate": Command("mtmd.ablation", "add_arguments", "run", "the paper's Tables II and III"),
    "search": Command("mtmd.search", "add_arguments", "run", "random search over the paper's grid"),
    "report": Command("mtmd.report", "add_arguments", "run", "figures and tables of finished experiments"),
    "convert": Command("mtmd.own_format", "add_convert_arguments", "run_convert", "a pickle of MMSA to the own format"),
    "check": Command("mtmd.own_format", "add_check_arguments", "run_check", "what is odd about a data set"),
    "export": Command("mtmd.inference", "add_export_arguments", "run_export", "a checkpoint as a torch.export program"),
}


def parse(
    arguments: list[str], description: str
) -> tuple[str, argparse.Namespace, Callable[[argparse.Namespace, Console], int | None]]:
    """What was asked for: the command, its parsed options, and the function that runs it.

    argparse ends the program after `--help`, or with exit code 2 and a message where an option is wrong.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        top = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=overview()
        )
        top.print_help()
        top.exit()
    if arguments and arguments[0] in COMMANDS:
        name, rest = arguments[0], arguments[1:]
    elif arguments and not arguments[0].startswith("-"):
        raise ValueError(f"command: expected one of {', '.join(COMMANDS)}, got {arguments[0]!r}")
    else:
        name, rest = DEFAULT, arguments
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(
        prog=f"mtmd_mosi.py {name}",
        description=f"{name}: {command.summary}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    getattr(module, command.add_arguments)(parser)
    parsed, unknown = parser.parse_known_args(rest)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion(parser, unknown)}")
    return name, parsed, getattr(module, command.run)


def suggestion(parser: argparse.ArgumentParser, unknown: list[str]) -> str:
    """The options that were probably meant."""
    options = [text.partition("=")[0] for text in unknown if text.startswith("-")]
    near = [match for text in options for match in difflib.get_close_matches(text, parser._option_string_actions, n=1)]
    return f"; did you mean {', '.join(near)}?" if near else ""


def overview() -> str:
    """The commands and how to learn more, for `--help`."""
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["commands:", *lines, "", "COMMAND --help explains the options of a command."])


def note(console: Console, text: str) -> None:
    """What is worth knowing but stops nothing, on one line."""
    console.print(f"note: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
