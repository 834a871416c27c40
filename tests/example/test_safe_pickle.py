"""Hostile pickles are refused without running; honest ones of every protocol are read."""

import builtins
import collections
import contextlib
import copyreg
import datetime
import fractions
import functools
import io
import pickle
import random
import struct
import sys

import numpy as np
import pytest

from mtmd.files.safe_pickle import DamagedPickleError, UnsafePickleError, load

# A small assembler of pickle streams.

STOP = b"."


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value):
    return b"J" + struct.pack("<i", value)


def block(value):
    return b"B" + struct.pack("<I", len(value)) + value


def group(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *arguments):
    return function + group(*arguments) + b"R"


NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"
NDARRAY = name("numpy", "ndarray")
RECONSTRUCT = name("numpy.core.multiarray", "_reconstruct")
FROMBUFFER = name("numpy._core.numeric", "_frombuffer")
SCALAR = name("numpy.core.multiarray", "scalar")
BLANK = call(RECONSTRUCT, NDARRAY, group(number(0)), block(b"b"))
FLOAT = call(name("numpy", "dtype"), text("f4"), FALSE, TRUE)


def dtype_state(order="<", subdtype=NONE, names=NONE, fields=NONE, size=-1):
    tail = (number(size), number(-1), number(0))
    return group(number(3), text(order), subdtype, names, fields, *tail) + b"b"


def array_of(shape, dtype=FLOAT, data=b"\0\0\0\0"):
    size = group(*[number(one) for one in shape])
    return BLANK + group(number(1), size, dtype, FALSE, block(data)) + b"b"


def deep_key():
    """A dictionary key of 2**60 leaves: hashing it would not end."""
    doubling = b"".join(b"h%c" % (n,) + b"h%c" % (n,) + b"\x86q%c" % (n + 1,) for n in range(60))
    return b"}" + b")q\0" + doubling + NONE + b"s"


# Those that could run something would make a file "ran" in the working directory. Names that are called: HOSTILE.
ATTACKS = {
    "os.system": call(name("os", "system"), text("touch ran")),
    "getattr chain": call(
        call(name("builtins", "getattr"), call(name("builtins", "__import__"), text("os")), text("system")),
        text("touch ran"),
    ),
    "dotted name": call(b"\x80\x04" + text("numpy") + text("ndarray.__class__") + b"\x93", text("ran")),
    "dotted permitted module": call(b"\x80\x04" + text("_codecs") + text("encode.__globals__") + b"\x93"),
    "stack global of no strings": b"\x80\x04" + number(1) + number(2) + b"\x93",
    "numpy runstring": call(name("numpy.testing._private.utils", "runstring"), text("open('ran', 'w')"), b"}"),
    "functools.partial": call(call(name("functools", "partial"), name("builtins", "open")), text("ran"), text("w")),
    "collections.defaultdict": call(name("collections", "defaultdict"), name("builtins", "open")),
    "nested reduce": call(name("collections", "OrderedDict"), call(name("builtins", "open"), text("ran"), text("w"))),
    "reduce inside an array": BLANK + group(number(1), call(name("builtins", "open"), text("ran"), text("w"))),
    "INST": b"(" + text("touch ran") + b"ios\nsystem\n",
    "NEWOBJ": name("builtins", "object") + b")\x81",
    "NEWOBJ of a permitted name": NDARRAY + group(number(5)) + b"\x81",
    "NEWOBJ_EX": NDARRAY + b")}\x92",
    "EXT1": b"\x82\xf0",
    "EXT2": b"\x83\xf0\x00",
    "EXT4": b"\x84\xf0\x00\x00\x00",
    "PERSID": b"P1\n",
    "BINPERSID": text("x") + b"Q",
    "NEXT_BUFFER": b"\x97",
    "set": b"\x8f",
    "frozenset": b"(\x91",
    "DUP": text("x") + b"2",
    "string of Python 2": b"S'x'\n",
    "BUILD on a permitted function": name("_codecs", "encode") + b"}" + b"b",
    "BUILD on a dictionary": b"}}b",
    "BUILD on a list": b"]}b",
    "BUILD with slots": name("numpy", "dtype") + group(NONE, b"}") + b"b",
    "encode with another codec": call(name("_codecs", "encode"), text("x"), text("idna")),
    "encode with errors": call(name("_codecs", "encode"), text("x"), text("latin1"), text("strict")),
    "encode of no string": call(name("_codecs", "encode"), number(5), text("latin1")),
    "bytes of a size": call(name("builtins", "bytes"), number(2**31 - 1)),
    "ndarray of a size": call(NDARRAY, group(number(2**31 - 1))),
    "reconstruct a size": call(RECONSTRUCT, NDARRAY, group(number(2**31 - 1)), block(b"b")),
    "reconstruct another type": call(RECONSTRUCT, name("numpy", "dtype"), group(number(0)), block(b"b")),
    "array larger than its data": array_of((2**31 - 1, 2**31 - 1)),
    "array of negative size": array_of((-1, -1)),
    "empty array of huge size": array_of((2**31 - 1, 0), data=b""),
    "array of 1,000 dimensions": array_of([1] * 1000),
    "array of a dtype that is none": array_of((1,), dtype=text("f4")),
    "array of a list": BLANK + group(number(1), group(number(1)), FLOAT, FALSE, b"]") + b"b",
    "array with a broken state": BLANK + group(number(1)) + b"b",
    "array of impossible characters": array_of(
        (1,), call(name("numpy", "dtype"), text("U1"), FALSE, TRUE), b"\xff\xff\xff\xff"
    ),
    "buffer larger than its data": call(FROMBUFFER, block(b"0000"), FLOAT, group(number(2**31 - 1)), text("C")),
    "buffer with a wrong axis": call(FROMBUFFER, block(b"0000"), FLOAT, group(number(1)), text("K"), group(number(7))),
    "scalar larger than its data": call(SCALAR, FLOAT, block(b"0")),
    "dtype of objects": call(name("numpy", "dtype"), text("O8"), FALSE, TRUE),
    "dtype with fields": call(name("numpy", "dtype"), text("f4,O"), FALSE, TRUE),
    "dtype from a dictionary": call(name("numpy", "dtype"), b"}"),
    "dtype of 10 GB": call(name("numpy", "dtype"), text("V10000000000"), FALSE, TRUE),
    "dtype with a subdtype": FLOAT + dtype_state(subdtype=group(FLOAT, number(9))),
    "dtype with names": FLOAT + dtype_state(names=group(text("x")), fields=b"}"),
    "dtype of a wrong size": FLOAT + dtype_state(size=2**30),
    "dtype by itself": FLOAT,
    "function by itself": b"]" + name("_codecs", "encode") + b"a",
    "type by itself": b"}" + text("x") + NDARRAY + b"s",
    "calling a string": text("os.system") + group(text("touch ran")) + b"R",
    "calling an array": BLANK + b")R",
    "tuple as key": b"}" + group(number(1)) + NONE + b"s",
    "key of 2**60 leaves": deep_key(),
    "items of a list": b"]" + text("x") + NONE + b"s",
    "append to a dictionary": b"}" + NONE + b"a",
    "odd number of items": b"}(" + text("x") + b"u",
    "text of 4 GB": b"X\xff\xff\xff\xff",
    "bytes of 2**62": b"\x8e" + struct.pack("<Q", 2**62),
    "bytearray of 2**40": b"\x96" + struct.pack("<Q", 2**40),
    "bytearray of 2**63": b"\x96" + struct.pack("<Q", 2**63),
    "frame of 2**62": b"\x80\x04\x95" + struct.pack("<Q", 2**62),
    "integer of 2 GB": b"\x8b\xff\xff\xff\x7f",
    "integer of negative length": b"\x8b\xff\xff\xff\xff",
    "integer of 100,000 digits": b"I" + b"9" * 100_000 + b"\n",
    "unknown protocol": b"\x80\xff" + NONE,
    "unknown opcode": b"\xff",
    "empty stack": b"",
    "no mark": NONE + b"t",
    "unknown memo": b"h\x07",
}


def refuse(tmp_path, content):
    """Load `content`, which must fail in one error that names the file, and return its text."""
    path = tmp_path / "hostile.pkl"
    path.write_bytes(content)
    with pytest.raises(UnsafePickleError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message) < len(str(path)) + 400
    assert message.isprintable()
    assert caught.value.__suppress_context__
    return message


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_hostile_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    refuse(tmp_path, attack + STOP)
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pkl"]


def test_the_attacks_would_work_on_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for attack in ("getattr chain", "INST"):
        pickle.loads(ATTACKS[attack] + STOP)
        (tmp_path / "ran").unlink()


# Every name below by every way that pickle has of calling something, and in every place where an array wants a name.

SHELL, CODE, PATH = text("mkdir ran"), text("__import__('os').mkdir('ran')"), text("ran")

# Pickle runs these, and there is a folder afterwards whose name begins with "ran".
WORKING = [
    *[(module, "system", SHELL) for module in ("os", "posix")],
    *[(module, "mkdir", PATH) for module in ("os", "posix")],
    *[("subprocess", function, SHELL) for function in ("getoutput", "getstatusoutput")],
    *[("builtins", function, CODE) for function in ("eval", "exec")],
    ("os", "makedirs", PATH),
    ("timeit", "timeit", text("pass"), CODE),
    ("cProfile", "run", CODE),
    ("tempfile", "mkdtemp", text(""), PATH, text(".")),
    ("numpy", "save", PATH, number(1)),
]
# Modules with what they have that would be of use to somebody.
OTHERS = """
    builtins: compile __import__ getattr setattr delattr open breakpoint input globals vars type memoryview
    __builtin__: eval execfile apply file reload
    os: popen execv spawnl remove putenv fork kill _exit _wrap_close
    nt: system
    subprocess: Popen run call check_call check_output
    commands: getoutput
    operator: attrgetter methodcaller itemgetter call
    functools: partial reduce cached_property
    itertools: starmap
    copyreg: _reconstructor __newobj__ __newobj_ex__ add_extension
    importlib: import_module reload __import__
    types: FunctionType CodeType ModuleType MethodType SimpleNamespace
    codecs: open encode decode lookup register
    runpy: run_path run_module _run_code
    pydoc: pipepager locate safeimport
    webbrowser: open get register
    pickle: loads load Unpickler _loads
    _pickle: loads load Unpickler
    marshal: loads
    shelve: open
    dbm: open
    sqlite3: connect
    torch: load save from_file compile
    torch.hub: load load_state_dict_from_url download_url_to_file
    torch.storage: _load_from_bytes
    torch._utils: _rebuild_tensor_v2 _rebuild_parameter
    numpy: load fromfile memmap savetxt genfromtxt fromregex vectorize
    numpy.core.multiarray: fromfile array frombuffer _ARRAY_API
    numpy.f2py: compile run_main
    numpy.f2py.crackfortran: getlincoef
    numpy.ctypeslib: load_library as_array
    numpy.testing: runstring rundocs measure
    joblib: load dump
    yaml: load
    dill: loads
    pathlib: Path PosixPath
    io: open FileIO open_code
    ctypes: CDLL cast string_at
    sys: exit settrace setrecursionlimit _getframe
    socket: create_connection
    urllib.request: urlopen
    smtplib: SMTP
    multiprocessing: Process Pool
    threading: Thread
    signal: raise_signal alarm
    code: InteractiveInterpreter interact
    bdb: Bdb
    pdb: run
    pty: spawn
    doctest: debug_script
    shutil: rmtree copyfile
    zipfile: ZipFile
    tarfile: open
    venv: create
    mtmd.files.safe_pickle: load _Reader
    __main__: anything
"""


def stack_name(module, attribute):
    return b"\x80\x04" + text(module) + text(attribute) + b"\x93"


WAYS = {
    "REDUCE": lambda module, function, *arguments: call(name(module, function), *arguments),
    "STACK_GLOBAL": lambda module, function, *arguments: call(stack_name(module, function), *arguments),
    "INST": lambda module, function, *arguments: b"(" + b"".join(arguments) + b"i" + name(module, function)[1:],
    "OBJ": lambda module, function, *arguments: b"(" + name(module, function) + b"".join(arguments) + b"o",
    "NEWOBJ": lambda module, function, *arguments: name(module, function) + group(*arguments) + b"\x81",
    "NEWOBJ_EX": lambda module, function, *arguments: name(module, function) + group(*arguments) + b"}\x92",
    "BUILD": lambda module, function, *arguments: name(module, function) + group(*arguments) + b"b",
    "not called": lambda module, function, *_: b"]" + name(module, function) + b"a",
    "framed": lambda *target: framed(WAYS["STACK_GLOBAL"](*target)),
    "as the type of an array": lambda module, function, *_: call(RECONSTRUCT, name(module, function), group(number(0))),
    "as the dtype of an array": lambda *target: array_of((1,), dtype=WAYS["REDUCE"](*target)),
    "as the data of an array": lambda *target: call(FROMBUFFER, WAYS["REDUCE"](*target), FLOAT, group(number(1))),
    "as a value": lambda *target: b"}" + text("train") + WAYS["REDUCE"](*target) + b"s",
    "as a key": lambda *target: b"}" + WAYS["REDUCE"](*target) + NONE + b"s",
}


def framed(content):
    return b"\x80\x05\x95" + struct.pack("<Q", len(content)) + content


# From a name that is permitted to what it hangs on to.
WALKS = [
    *[("numpy", f"ndarray.{rest}") for rest in ("__class__", "tofile", "__reduce__", "__init__.__objclass__", "dump")],
    *[("numpy", f"dtype.{rest}") for rest in ("__class__.__base__", "__new__", "type", "__reduce__.__self__")],
    *[("numpy", f"{rest}.system") for rest in ("os", "lib._utils_impl.os", "f2py.os", "testing._private.utils.os")],
    *[("_codecs", f"encode.{rest}") for rest in ("__globals__", "__self__", "__module__", "__self__.__loader__")],
    *[("collections", f"OrderedDict.{rest}") for rest in ("__init__.__globals__", "__class__", "__subclasses__")],
    *[("builtins", f"bytes.{rest}") for rest in ("__class__", "__base__.__subclasses__", "fromhex", "__new__")],
    *[(f"numpy.{core}.multiarray", "_reconstruct.__globals__") for core in ("core", "_core")],
    *[(f"numpy.{core}.multiarray", "scalar.__self__") for core in ("core", "_core")],
    *[(f"numpy.{core}.numeric", "_frombuffer.__globals__") for core in ("core", "_core")],
    *[("numpy.core", "multiarray._reconstruct"), ("numpy", "core.multiarray._reconstruct"), ("", "numpy.ndarray")],
    *[("numpy ", "ndarray"), ("Numpy", "ndarray"), ("numpy", "ndarray "), ("numpy", "ndarray\0")],
]
LISTED = [line.split() for line in OTHERS.strip().splitlines()]
TARGETS = [*WORKING, *((module[:-1], function, SHELL) for module, *functions in LISTED for function in functions)]
HOSTILE = {f"{target[0]}.{target[1]}, {way}": make(*target) for target in TARGETS for way, make in WAYS.items()}
HOSTILE |= {f"{'.'.join(walk)!a}, {how.__name__}": call(how(*walk)) for walk in WALKS for how in (name, stack_name)}


def test_there_are_more_than_two_hundred_different_ways():
    assert len(set(HOSTILE.values())) == len(HOSTILE) > 200


def test_no_way_to_call_anything_runs_or_imports_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watched = []
    loaded = set(sys.modules)
    monkeypatch.setattr(builtins, "__import__", lambda *arguments, **_: watched.append(arguments[0]))
    for way, content in HOSTILE.items():
        assert refuse(tmp_path, content + STOP), way
        assert [path.name for path in tmp_path.iterdir()] == ["hostile.pkl"], way
    assert watched == []
    assert set(sys.modules) == loaded


@pytest.mark.parametrize("target", WORKING, ids=lambda target: ".".join(target[:2]))
def test_pickle_would_run_them(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    ways = {"REDUCE", "STACK_GLOBAL", "framed", "as a value", "as the data of an array", "INST", "OBJ"}
    for way in sorted(ways):
        with contextlib.suppress(Exception):  # what comes of it is another matter
            pickle.loads(WAYS[way](*target) + STOP)
        (made,) = tmp_path.glob("ran*")
        made.unlink() if made.is_file() else made.rmdir()


@pytest.mark.parametrize("opcode", [b"\x82\xf0", b"\x83\xf0\0", b"\x84\xf0\0\0\0"], ids=["EXT1", "EXT2", "EXT4"])
def test_the_registry_of_extensions_runs_nothing(tmp_path, monkeypatch, opcode):
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("os", "mkdir", 0xF0)
    try:
        refuse(tmp_path, call(opcode, PATH) + STOP)
        assert not (tmp_path / "ran").exists()
        pickle.loads(call(opcode, PATH) + STOP)
        assert (tmp_path / "ran").exists()
    finally:
        copyreg.remove_extension("os", "mkdir", 0xF0)


class Evil:
    def __init__(self, reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        Evil((print, ("ran",))),
        {"train": {"audio": np.zeros(3), "id": [Evil((exec, ("raise SystemExit",)))]}},
        Evil((np.zeros, ((3,),), None, iter([1]), None)),
        datetime.datetime(2020, 1, 1),
        fractions.Fraction(1, 2),
        collections.Counter("abc"),
        functools.partial(print),
        1 + 2j,
        slice(1),
        np.ma.zeros(3),
        np.recarray(3, "f4"),
        np.dtype("f4"),
        np.datetime64("2020"),
        np.zeros(3, "f4,i4"),
        np.zeros(3, complex),
        np.zeros(3, "M8[s]"),
        np.random.default_rng(0),
        np.zeros,
        np.ndarray,
        {1: 2},
        {"x": {(1, 2): 3}},
    ],
    ids=lambda value: f"{type(value).__module__}.{type(value).__name__}",
)
def test_honest_pickle_of_something_else_is_refused(tmp_path, value, protocol, capsys):
    refuse(tmp_path, pickle.dumps(value, protocol))
    assert capsys.readouterr().out == ""


def test_refusal_names_what_was_asked_for(tmp_path):
    assert "asks for 'os.system'" in refuse(tmp_path, ATTACKS["os.system"] + STOP)
    assert "opcode INST" in refuse(tmp_path, ATTACKS["INST"] + STOP)
    assert "key of type tuple" in refuse(tmp_path, ATTACKS["tuple as key"] + STOP)
    weird = name("\x1b[31m", "x" * 10_000) + STOP
    assert "asks for '\\x1b[31m.xxx" in refuse(tmp_path, weird)


@pytest.mark.parametrize("protocol", range(6))
def test_object_array_is_refused_with_a_way_out(tmp_path, protocol):
    value = {"raw_text": np.array(["a", "bc"], dtype=object)}
    message = refuse(tmp_path, pickle.dumps(value, protocol))
    assert "dtype object" in message
    assert "tolist()" in message


def test_using_the_same_bytes_again_and_again_is_refused(tmp_path):
    data = block(b"\0" * 4000) + b"q\x09"
    state = group(number(1), group(number(1000)), FLOAT, FALSE, b"h\x09") + b"q\x08"
    copies = (BLANK + b"h\x08b") * 1000
    message = refuse(tmp_path, data + state + b"(" + copies + b"t" + STOP)
    assert "more data than the file holds" in message


def test_memo_index_takes_no_memory(tmp_path):
    path = tmp_path / "memo.pkl"
    path.write_bytes(NONE + b"r\xff\xff\xff\xff" + STOP)
    assert load(path) is None


def test_deep_nesting_neither_crashes_nor_recurses(tmp_path):
    path = tmp_path / "deep.pkl"
    path.write_bytes(b"]" * 200_000 + b"a" * 199_999 + STOP)
    assert isinstance(load(path), list)


def test_shared_dtypes_of_the_process_are_not_touched(tmp_path):
    path = tmp_path / "swap.pkl"
    dtype = call(name("numpy", "dtype"), text("f4"), FALSE, FALSE) + dtype_state(order=">")
    path.write_bytes(array_of((1,), dtype, struct.pack(">f", 1.5)) + STOP)
    assert load(path) == np.array([1.5], "f4")
    assert np.dtype("f4").isnative
    assert np.dtype(np.float32).itemsize == 4


HONEST = {
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "double": np.linspace(0, 1, 5),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "big endian": np.arange(4, dtype=">f8"),
    "strings": np.array(["a", "bücher", "日本"]),
    "byte strings": np.array([b"a", b"bc"]),
    "booleans": np.array([True, False]),
    "half": np.ones((3, 1), np.float16),
    "empty": np.zeros((0, 3)),
    "zero-dimensional": np.array(2.5),
    "special values": np.array([np.nan, np.inf, -np.inf]),
    "scalar": np.float32(1.5),
    "string scalar": np.str_("x"),
    "list": ["text", "ü\n\0", 1, -1, 2**31, -(2**70), 10**400, 1.5, None, True, False, b"", b"\xff"],
    "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "ordered": collections.OrderedDict(b=1, a={}),
    "lengths": [np.int64(3), np.int64(4)],
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("numpy_1", [False, True], ids=["numpy 2", "numpy 1"])
def test_plain_data_of_every_protocol_is_read(tmp_path, protocol, numpy_1):
    content = pickle.dumps(HONEST, protocol)
    if numpy_1:
        content = rename_core(HONEST, protocol)
    path = tmp_path / "honest.pkl"
    path.write_bytes(content)
    loaded = load(path)
    assert list(loaded) == list(HONEST)
    for key, value in HONEST.items():
        assert type(loaded[key]) is type(value), key
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(loaded[key], value)
            assert loaded[key].dtype == value.dtype.newbyteorder("=")
            assert loaded[key].flags.writeable
        else:
            assert loaded[key] == value


def rename_core(value, protocol):
    """Pickle as numpy 1 would, whose modules are called numpy.core.*."""

    class OldNames(pickle._Pickler):
        def save_global(self, obj, name=None):
            module = getattr(obj, "__module__", None) or ""
            if module.startswith("numpy._core"):
                old = module.replace("numpy._core", "numpy.core")
                if protocol >= 4:
                    self.save(old)
                    self.save(obj.__name__)
                    self.write(pickle.STACK_GLOBAL)
                else:
                    self.write(f"c{old}\n{obj.__name__}\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

        dispatch = pickle._Pickler.dispatch | {
            type(rename_core): save_global,
            type(len): save_global,
        }

    file = io.BytesIO()
    OldNames(file, protocol).dump(value)
    assert b"numpy.core" in file.getvalue()
    assert b"numpy._core" not in file.getvalue()
    return file.getvalue()


def test_shared_and_cyclic_containers_are_read(tmp_path):
    shared = [1, 2]
    cyclic = {"a": shared, "b": shared}
    cyclic["self"] = cyclic
    path = tmp_path / "cyclic.pkl"
    path.write_bytes(pickle.dumps(cyclic))
    loaded = load(path)
    assert loaded["a"] is loaded["b"]
    assert loaded["self"] is loaded


@pytest.mark.parametrize("protocol", range(6))
def test_every_truncation_ends_in_one_clear_error(tmp_path, protocol):
    content = pickle.dumps({"a": np.arange(3.0), "b": ["x", 1], "c": np.float32(1)}, protocol)
    path = tmp_path / "cut.pkl"
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(DamagedPickleError, match=r"truncated|ends|bytes"):
            load(path)


def test_random_bytes_and_flipped_bytes_end_in_one_clear_error_or_plain_data(tmp_path):
    rng = random.Random(0)
    honest = pickle.dumps({"a": np.arange(30.0), "b": ["x", 1], "c": np.float32(1)})
    path = tmp_path / "garbage.pkl"
    refused = 0
    for round_ in range(1000):
        content = bytearray(honest if round_ % 2 else rng.randbytes(rng.randrange(1, 200)))
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            load(path)
        except UnsafePickleError:
            refused += 1
    assert refused > 500


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere.pkl")


def test_nothing_is_imported(tmp_path):
    assert "this" not in sys.modules
    refuse(tmp_path, name("this", "s") + STOP)
    assert "this" not in sys.modules


def test_real_mosi_file_reads_as_pickle_reads_it(mosi_path):
    with open(mosi_path, "rb") as file:
        expected = pickle.load(file)
    loaded = load(mosi_path)
    for fold, fields in expected.items():
        assert list(loaded[fold]) == list(fields)
        for key, value in fields.items():
            assert loaded[fold][key].dtype == value.dtype
            np.testing.assert_array_equal(loaded[fold][key], value)
