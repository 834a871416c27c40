"""Every public docstring has what its reader needs: shapes, ranges, errors, equation and source, an example."""

import ast
import inspect
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from torch import nn

import momentum_distill as md

# Formulas of our own, which no paper has.
OWN = {"l2_normalize", "mean_rows"}
# What computes nothing, or what another docstring has in full.
WITHOUT_EQUATION = {"ClassQueue", "SupConTerms", "gather_rows", "param_groups", "supcon_distill_terms"}
# Overridden for torch, not called by users.
PLUMBING = {"extra_repr", "get_extra_state", "set_extra_state", "train"}

SECTION = re.compile(r"^(Args|Returns|Raises|Warns|Example|References):$", flags=re.MULTILINE)
ENTRY = re.compile(r"^    (\*{0,2}\w+): ", flags=re.MULTILINE)
SHAPE = re.compile(r"\bshapes?\b|`[^`]*\((?:[A-Z]\b|\)|sum)[^`]*`")
RANGE = re.compile(r"\[.+,.+[\])]|[<>]|at least|positive|finite|inside|Smallest|Label|1e-\d", flags=re.DOTALL)


def public_api():
    """`(name, object)` of everything public: classes, their methods and properties, functions."""
    found = []
    modules = [(md, ""), (md.functional, "functional."), (md.diagnostics, "diagnostics."), (md.schedules, "schedules.")]
    for module, prefix in modules:
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.ismodule(thing):
                found.append((prefix + name, thing))
            if inspect.isclass(thing) and issubclass(thing, nn.Module):
                found += [
                    (f"{prefix}{name}.{member}", value)
                    for member, value in vars(thing).items()
                    if not member.startswith("_")
                    and member not in PLUMBING
                    and (inspect.isfunction(value) or isinstance(value, property))
                ]
    return found


API = public_api()
CLASSES = {name for name, thing in API if inspect.isclass(thing)}


def takes_arguments(name, thing):
    """Whether it is called with arguments that its docstring has to explain: not a property, not a tuple of results."""
    return not isinstance(thing, property) and name != "functional.SupConTerms" and bool(parameters(thing))


def parameters(thing):
    """Parameters by name, without self."""
    found = dict(inspect.signature(thing).parameters)
    found.pop("self", None)
    return found


def documentation(thing):
    text = inspect.getdoc(thing)
    assert text, "no docstring"
    return text


def sections(thing):
    """The text of each section by title; before the first one, by ""."""
    parts = SECTION.split(documentation(thing))
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(text):
    """The text of each argument or error by name."""
    parts = ENTRY.split(text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def refers_to_others(thing):
    """Whether the arguments are those of another docstring, which it names."""
    return re.search(r"same arguments|arguments as in the call", sections(thing)[""]) is not None


def mentions(annotation, *kinds):
    return any(re.search(rf"\b{kind}\b", annotation) for kind in kinds)


def every(things):
    return pytest.mark.parametrize(("name", "thing"), things, ids=[name for name, _ in things])


ALL = every(API)
WHOLE = every([(name, thing) for name, thing in API if name.rpartition(".")[0] not in CLASSES])  # no members
CALLED = every([(name, thing) for name, thing in API if takes_arguments(name, thing)])


def test_the_walk_finds_the_api():
    names = {name for name, _ in API}
    assert {"EMAWrapper", "EMAWrapper.swap", "ClassQueue.enqueue", "SupConDistillLoss.terms", "gather_rows"} <= names
    assert {f"functional.{name}" for name in md.functional.__all__} <= names
    assert {f"diagnostics.{name}" for name in md.diagnostics.__all__} <= names
    assert {f"schedules.{name}" for name in md.schedules.__all__} <= names
    assert not {name for name in names if name.rpartition(".")[2] in PLUMBING}


@ALL
def test_the_first_line_is_a_sentence(name, thing):
    first = documentation(thing).split("\n\n")[0]
    assert first.endswith("."), name
    assert "\n" not in first, name
    assert first[0].isupper() or first[0] in "`$", name


@CALLED
def test_every_argument_is_explained(name, thing):
    if not refers_to_others(thing):
        assert list(entries(sections(thing)["Args"])) == [
            {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + key
            for key, parameter in parameters(thing).items()
        ], name


@CALLED
def test_tensors_have_shapes_and_numbers_ranges(name, thing):
    if refers_to_others(thing):
        return
    explained = entries(sections(thing)["Args"])
    for key, parameter in parameters(thing).items():
        text, annotation = explained.get(key, ""), str(parameter.annotation)
        numbers = mentions(annotation, "float", "int")
        if mentions(annotation, "Tensor") and not numbers:
            assert SHAPE.search(text), (name, key, text)
        if numbers:
            assert RANGE.search(text), (name, key, text)


def choices(annotation):
    """The strings that an argument of this type may be."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for part in get_args(annotation) for choice in choices(part)]


@CALLED
def test_every_choice_is_explained(name, thing):
    if refers_to_others(thing):
        return
    hints = get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)
    for key, text in entries(sections(thing)["Args"]).items():
        others = re.findall(r"as in :\w+:`(\w+)`", text)
        told = documentation(thing) + "".join(documentation(getattr(md.functional, other)) for other in others)
        for choice in choices(hints[key.lstrip("*")]):
            assert f'"{choice}"`' in told, (name, key, choice)


def test_choices_are_found():
    hints = get_type_hints(md.SupConDistillLoss.__init__)
    assert choices(hints["positives"]) == ["outside", "inside", "inside_per_positive"]
    assert choices(hints["group"]) == ["auto"]


@ALL
def test_what_comes_back_has_a_shape_or_a_meaning(name, thing):
    if name in CLASSES:
        return
    if isinstance(thing, property):
        answer, text = str(inspect.signature(thing.fget).return_annotation), documentation(thing)
    else:
        answer, text = str(inspect.signature(thing).return_annotation), sections(thing).get("Returns", "")
        if answer in ("None", "Iterator[None]") or not parameters(thing):
            return
        assert text, name
    if mentions(answer, "Tensor"):
        assert SHAPE.search(text) or "equal to" in text, (name, text)


@CALLED
def test_errors_are_named(name, thing):
    if refers_to_others(thing) or name in ("EMAWrapper.forward", "EMADict.forward"):  # whatever the module raises
        return
    raised = entries(sections(thing)["Raises"])
    assert raised, name
    assert set(raised) <= {"TypeError", "ValueError", "RuntimeError"}, name
    for text in raised.values():
        assert text.rstrip().endswith("."), name


@ALL
def test_there_is_an_example(name, thing):
    if name != "functional.SupConTerms" and not isinstance(thing, property):
        assert ">>> " in sections(thing)["Example"], name


@WHOLE
def test_the_equation_stands_there_with_its_source(name, thing):
    short = name.rpartition(".")[2]
    if short in WITHOUT_EQUATION:
        return
    assert "$$" in documentation(thing), f"{name}: its equation between $$ and $$"
    if short not in OWN:
        source = re.search(r"\bEq\. \d|\b20\d\d\b", documentation(thing))
        assert source, f"{name}: its source under References, `Eq. 7` of the paper or authors and year of another"


def test_the_fields_of_the_terms_are_explained_with_shapes():
    path = Path(md.functional.__file__)
    (terms,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "SupConTerms"
    )
    body = terms.body[1:]
    fields = [node.target.id for node in body[0::2]]
    assert fields == list(md.functional.SupConTerms._fields)
    for field, text in zip(fields, body[1::2], strict=True):
        assert re.search(r"\bshape\b", text.value.value), field


@ALL
def test_formulas_are_closed(name, thing):
    text = re.sub(r"`[^`]*`", "", documentation(thing))
    assert text.count("$$") % 2 == 0, name
    assert text.replace("$$", "").count("$") % 2 == 0, name
