"""Settings as options of a command, alone or beside a TOML file of them."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mtmd.files.checks import shown, unknown
from mtmd.files.reading import read_toml
from mtmd.settings.config import FORMATS, MODALITIES, SYNTHETIC, TEACHER, TERMS, Config

# Options that say nothing beside others are refused on the command line, where somebody meant them, if they are not at
# their default. A file may have them: one serves for all arms of the study.
IDLE: tuple[tuple[tuple[str, ...], str, Callable[["Config"], bool]], ...] = (
    (("synthetic_seed", *SYNTHETIC), "the synthetic set", lambda config: config.data is None),
    (
        ("max_tokens", "pooling", "bert_lr", "layer_decay", "context"),
        "a --text-encoder",
        lambda config: config.reads_tokens,
    ),
    (("text_hidden",), "--text-encoder features", lambda config: not config.reads_tokens),
    *(
        ((f"drop_{name}",), f"{name} as a modality", lambda config, name=name: name in config.used)
        for name in MODALITIES
    ),
    (("text_encoder",), "text as a modality", lambda config: TEACHER in config.used),
    (("fusion_start",), "text beside other modalities", lambda config: {TEACHER} < {*config.used}),
    *(((f"gamma_{term}",), f"L_{term}", lambda config, term=term: term not in config.off) for term in TERMS),
    (("score_width",), "--sampling distance", lambda config: config.sampling == "distance"),
    (
        ("sampling", "positives", "temperature", "hardness", "detach_text"),
        "L_feat",
        lambda config: "feat" not in config.off,
    ),
    (("queue_size", "balanced_queue"), "a queue", lambda config: "queue" not in config.off),
    (("alpha",), "momentum models", lambda config: "momentum_dmd" not in config.off),
    (
        ("decay",),
        "momentum models or factors",
        lambda config: not {"momentum_dmd", "momentum_mfd"} <= config.off,
    ),
)


# Options. argparse puts the name of the option before what these say.


def whole(text: str, *, least: int | None = None, most: int | None = None) -> int:
    """A whole number, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or (least is not None and value < least) or (most is not None and value > most):
        bound = "" if least is None else f" of at least {least}"
        bound += "" if most is None else f", at most {most}"
        raise argparse.ArgumentTypeError(f"expected a whole number{bound}, got {shown(text)}")
    return value


def at_least(least: int, *, most: int | None = None) -> Callable[[str], int]:
    return functools.partial(whole, least=least, most=most)


def a_number(text: str) -> float:
    """A number, for argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {shown(text)}") from None


def a_path(text: str) -> Path:
    """A path, for argparse; an empty one would be the folder where one stands."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


def one_of(*known: str) -> Callable[[str], str]:
    """One of these words, for argparse."""

    def check(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(unknown(text, known))
        return text

    return check


def choice(*known: str) -> dict[str, Any]:
    """What makes an option of argparse one of these words."""
    return {"type": one_of(*known), "metavar": f"{{{','.join(known)}}}"}


def add_format(group: argparse._ArgumentGroup) -> None:
    """`--format`, where figures are drawn by a command that has not all the settings."""
    about = next(entry for entry in dataclasses.fields(Config) if entry.name == "format")
    text = f"{about.metadata['help']} (default: {about.default})"
    group.add_argument("--format", **choice(*FORMATS), default=about.default, help=text)


PARSERS = {int: whole, float: a_number, Path: a_path, str: str}


def add_config_arguments(parser: argparse.ArgumentParser, *, only: Collection[str] | None = None) -> None:
    """Every setting as an option, and `--config` for a file of them. What is not given stays out of the namespace.

    Args:
        parser: Gets the options.
        only: The settings that become options, where not all do.
    """
    parser.add_argument(
        "--config",
        type=a_path,
        metavar="FILE.toml",
        default=argparse.SUPPRESS,
        help="file of settings, named as here with '_' for '-'; options given beside it go before it",
    )
    hints = get_type_hints(Config)
    groups: dict[str, argparse._ArgumentGroup] = {}
    title = ""
    for entry in dataclasses.fields(Config):
        title = entry.metadata["group"] or title
        if only is not None and entry.name not in only:
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        option = "--" + entry.name.replace("_", "-")
        text = entry.metadata["help"].replace("%", "%%")
        kinds = [kind for kind in (get_args(hints[entry.name]) or (hints[entry.name],)) if kind is not type(None)]
        if kinds == [bool]:
            text += "" if entry.default is None else f" (default: {'on' if entry.default else 'off'})"
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        default = entry.default_factory() if entry.metadata["many"] else entry.default
        if default not in (None, []):
            shown = " ".join(str(value) for value in default) if entry.metadata["many"] else default
            text += f" (default: {shown})"
        choices = entry.metadata["choices"]
        group.add_argument(
            option,
            **(choice(*choices) if choices else {"type": PARSERS[kinds[0]], "metavar": kinds[0].__name__.upper()}),
            default=argparse.SUPPRESS,
            help=text,
            nargs="*" if entry.metadata["many"] else None,
        )


def config_from(arguments: argparse.Namespace) -> Config:
    """The settings that `--config` and the options give; an option goes before the file.

    Raises:
        ValueError: If the file is not what it should be, or the settings cannot be meant.
        OSError: If the file cannot be read.
    """
    given = vars(arguments)
    path = given.get("config")
    values = read_toml(path) if path is not None else {}
    fields = {entry.name: entry for entry in dataclasses.fields(Config)}
    options = {name: value for name, value in given.items() if name in fields}
    source = "settings" if path is None else f"{path} with the options beside it" if options else str(path)
    config = Config.from_values({**values, **options}, source=source)
    for names, beside, is_read in IDLE:
        for name in names:
            if name in options and options[name] != fields[name].default and not is_read(config):
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option}: expected {beside} beside it, got settings without; leave it out")
    return config
