"""The command line: which commands there are, and the parser of each.

A command is a pair of functions in a module that is imported only when the command is chosen: one adds its options to a
parser, the other runs it with what was parsed and a console to write to.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from rich.console import Console

from mtmd.files.checks import did_you_mean, unknown


class Command(NamedTuple):
    """Where a command lives, and what it does in a line."""

    module: str
    add_arguments: str  # its (parser) -> None
    run: str  # its (arguments, console) -> int | None; an int is the exit code
    summary: str


DEFAULT = "train"
COMMANDS = {
    "train": Command("mtmd.runs.experiment", "add_arguments", "run", "train from one or more seeds (the default)"),
    "evaluate": Command(
        "mtmd.runs.evaluate",
        "add_evaluate_arguments",
        "run_evaluate",
        "metrics of a checkpoint, also without modalities",
    ),
    "predict": Command("mtmd.runs.predict", "add_predict_arguments", "run_predict", "scores for own utterances"),
    "ablate": Command("mtmd.study.ablation", "add_arguments", "run", "the paper's Tables II and III"),
    "search": Command("mtmd.study.search", "add_arguments", "run", "random search over the paper's grid"),
    "report": Command("mtmd.study.report", "add_arguments", "run", "figures and tables of finished experiments"),
    "convert": Command("mtmd.data.check", "add_convert_arguments", "run_convert", "a pickle of MMSA to the own format"),
    "check": Command("mtmd.data.check", "add_check_arguments", "run_check", "what is odd about a data set"),
    "export": Command(
        "mtmd.runs.export", "add_export_arguments", "run_export", "a checkpoint as a torch.export program"
    ),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def parse(
    arguments: list[str], description: str
) -> tuple[str, argparse.Namespace, Callable[[argparse.Namespace, Console], int | None]]:
    """What was asked for: the command, its parsed options, and the function that runs it.

    `--help` ends the program.

    Raises:
        ValueError: If a command, an option or a value is wrong.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        top = argparse.ArgumentParser(
            usage="mtmd_mosi.py [COMMAND] [OPTIONS]",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=overview(),
        )
        top.print_help()
        top.exit()
    if arguments and arguments[0] in COMMANDS:
        name, rest = arguments[0], arguments[1:]
    elif arguments and not arguments[0].startswith("-"):
        raise ValueError(f"command: {unknown(arguments[0], COMMANDS)}")
    else:
        name, rest = DEFAULT, arguments
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = Parser(prog=f"mtmd_mosi.py {name}", description=f"{name}: {command.summary}.", allow_abbrev=False)
    getattr(module, command.add_arguments)(parser)
    shapes = {None: "{}", "?": "[{}]", "+": "{} ..."}
    wanted = [shapes[one.nargs].format(one.metavar or one.dest) for one in parser._get_positional_actions()]
    parser.usage = " ".join([parser.prog, *wanted, "[OPTIONS]"])
    parsed, others = parser.parse_known_args(rest)
    if others:
        options = [text.partition("=")[0] for text in others if text.startswith("-")]
        hint = did_you_mean(options, parser._option_string_actions)
        if not options and others[0] in COMMANDS:
            hint = f"; the command comes first: {others[0]} ..."
        raise ValueError(f"{name}: expected options that it has, got {' '.join(others)}{hint}")
    return name, parsed, getattr(module, command.run)


def overview() -> str:
    """The commands and how to learn more, for `--help`."""
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["commands:", *lines, "", "COMMAND --help explains the options of a command."])


def say(console: Console, text: str, style: str | None = None) -> None:
    """A text as it is, on one line."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def note(console: Console, text: str) -> None:
    """What is worth knowing but stops nothing."""
    say(console, f"note: {text}", "yellow")
