"""The names and arguments that users call, a line for each; `public_api.txt` has those that were promised."""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import momentum_distill as md

PINNED = Path(__file__).with_name("public_api.txt")

OWN_DUNDERS = ("__init__", "__len__")
OF_MODULES = ("extra_repr", "train", "get_extra_state", "set_extra_state")  # what torch calls, not the user
OF_CALLBACKS = ("state_dict", "load_state_dict", "state_key")  # what a trainer calls, beside `on_...`


def members(cls: type) -> Iterator[tuple[str, object]]:
    """Methods and properties that a block defines itself, or has from a base of ours."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith(md.__name__)]
    for name, member in {name: member for base in bases[::-1] for name, member in vars(base).items()}.items():
        plumbing = name.startswith(("_", "on_")) or name in (*OF_MODULES, *OF_CALLBACKS)
        public = name in OWN_DUNDERS or not plumbing
        if public and (callable(member) or isinstance(member, property)):
            yield name, member


def arguments(function: object) -> str:
    """The arguments of a function as they stand in its definition, without annotations."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    bare = [p.replace(annotation=p.empty) for p in parameters]
    return str(inspect.Signature(bare))[1:-1]


def found(modules: Iterable[ModuleType] = (md, md.functional, md.diagnostics, md.schedules)) -> list[str]:
    """A line for each name."""
    names = {}
    for module in modules:
        for name in module.__all__:
            path, item = f"{module.__name__}.{name}", getattr(module, name)
            if inspect.isclass(item) and hasattr(item, "_fields"):
                names[path] = ", ".join(item._fields)
            elif inspect.isclass(item):
                for member, value in members(item):
                    names[f"{path}.{member}"] = "property" if isinstance(value, property) else arguments(value)
            elif callable(item):
                names[path] = arguments(item)
    return [f"{name}({listed})" if listed != "property" else name for name, listed in names.items()]
