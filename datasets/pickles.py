"""Arrays in pickles, read without unpickling: whatever a file names, nothing of it is imported, called or allocated.

CIFAR's Python version is pickles, written by Python 2, of a dict of lists, strings and a NumPy array of bytes. Their
opcodes are walked by a machine that knows dicts, lists, tuples, constants, strings and the calls that make such an
array, which it notes instead of making them. What it holds is never larger than some times the file.
"""

import pickletools
from dataclasses import dataclass

import numpy as np

VALUES = {"SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
          "BINBYTES8", "BYTEARRAY8", "BININT", "BININT1", "BININT2"}
MAKERS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
          "EMPTY_LIST": list, "EMPTY_DICT": dict}
OPERANDS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}  # others take all since the last mark
CALLS = {"_codecs encode": "encode", "numpy dtype": "dtype", "numpy ndarray": "ndarray"}
for core in ("numpy.core", "numpy._core"):  # before and from NumPy 2 on; protocol 5 has the second call
    CALLS |= {f"{core}.multiarray _reconstruct": "array", f"{core}.numeric _frombuffer": "buffer"}
MOST = 2**19  # opcodes, a second's work; CIFAR-100 has half as many


@dataclass
class Call:
    """One of CALLS that a pickle names, with the arguments and the state that it would have got."""

    name: str
    arguments: tuple = ()
    state: tuple = ()


def read(content):
    """The dict in a pickle of protocol 2 or later; its keys are str. Whatever is wrong is a ValueError, or what Python
    raises for an operand that is not there or of another type.
    """
    stack, marks, memo = [], [], {}

    def operands(count):
        first = marks.pop() if count is None else len(stack) - count
        taken = stack[first:]
        del stack[first:]
        return taken

    def last(kind):
        if type(stack[-1]) is not kind:
            raise ValueError(f"it has a {type(stack[-1]).__name__} where a {kind.__name__} should be")
        return stack[-1]

    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if number == MOST:
            raise ValueError(f"it has more than {MOST:,} opcodes")
        if name in VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in MAKERS:
            stack.append(MAKERS[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(operands(OPERANDS.get(name))))
        elif name in ("APPEND", "APPENDS"):
            items = operands(OPERANDS.get(name))
            last(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = operands(OPERANDS.get(name))
            last(dict).update(zip(map(key, items[::2]), items[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            full = argument or " ".join(operands(2))
            if full not in CALLS:
                raise ValueError(f"it names {full.replace(' ', '.')[:80]!r}, which no array of bytes needs")
            stack.append(Call(CALLS[full]))
        elif name in ("REDUCE", "BUILD"):
            value, call = stack.pop(), last(Call)
            if name == "REDUCE":
                stack[-1] = Call(call.name, value)
            else:
                call.state = value
        elif name == "STOP":
            return last(dict)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the opcode {name}, which no array of bytes needs")


def key(value):
    """A key of a dict, a short string: it is hashed, which of nested tuples may take for ever."""
    value = plain(value)
    if type(value) not in (str, bytes) or len(value) > 100:
        raise ValueError("it has a key that is no short string")
    return value if type(value) is str else value.decode("latin1")


def plain(value):
    """The string that a noted call would have encoded: so Python 3 writes bytes in protocol 2. Others as they are."""
    return value.arguments[0] if type(value) is Call and value.name == "encode" else value


def array(value):
    """The uint8 array that a Call would have made; ValueError for whatever else this is."""
    match value:
        case (Call("array", (Call("ndarray"), *_), (_, tuple(shape), Call("dtype", (kind, *_)), order, raw))
              | Call("buffer", (raw, Call("dtype", (kind, *_)), tuple(shape), order))) if kind in ("u1", b"u1"):
            raw = plain(raw)
            raw = raw.encode("latin1") if type(raw) is str else raw  # str: as Python 2 wrote bytes
            return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if order in (True, "F") else "C")
    raise ValueError("it has no NumPy array of bytes where one should be")
