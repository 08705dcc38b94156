"""openpi's websocket protocol: msgpack with arrays, read within limits. Needs NumPy and msgpack alone.

An array is a map of the bytes keys `__ndarray__`, `data`, `dtype` and `shape`, a scalar one of `__npgeneric__`, `data`
and `dtype` (openpi `msgpack_numpy.py`). A request is a map of an observation, beside which it may have OPTIONS;
the answer has `actions`, `policy_timing` and `server_timing`. An error is a text frame of one line.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

from pi0_serve.limits import MAX_PIXELS

PROTOCOL = 1  # the version of OPTIONS
# What a request may have beside the observation, none of which openpi's clients send.
OPTIONS = ("protocol", "request_id", "reset", "subtask", "noise", "seed", "prev_chunk", "delay", "executed")

MAX_ITEMS = 20_000  # values of lists and maps in a message; arrays count as one
MAX_LENGTH = 4096  # of a list or a map
MAX_DEPTH = 8
MAX_DIMS = 8  # of an array
REFUSED = "VOc"  # kinds of dtypes that openpi does not send either
ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"
DTYPE = re.compile(r"[<>|=]?([biufSU])(\d{1,9})", re.ASCII)


class FrameError(ValueError):
    """A message that cannot be read; after it a connection is closed."""


class RequestError(ValueError):
    """A request that cannot be answered; the connection stays open."""


def pack(value: Any) -> bytes:
    """The message of a value. Raises ValueError for other objects, and arrays of objects, records or complex."""
    return msgpack.packb(value, default=_encode)


def unpack(message: bytes, max_pixels: int = MAX_PIXELS) -> Any:
    """The value of a message; arrays are read-only views of its bytes.

    What it declares is checked before it is allocated. Raises FrameError, by its key where an array is wrong.
    """
    count = 0

    def entered(value: Any) -> Any:
        nonlocal count
        count += len(value)
        if count > MAX_ITEMS:
            raise FrameError(f"the message has more than {MAX_ITEMS} values")
        return _decode(value, max_pixels) if isinstance(value, dict) else value

    limits: dict[str, Any] = {"max_array_len": MAX_LENGTH, "max_map_len": MAX_LENGTH, "max_ext_len": 0}
    try:
        value = msgpack.unpackb(message, object_hook=entered, list_hook=entered, **limits)
        _check(value)
    except FrameError:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as error:
        raise FrameError(f"the message is not msgpack as this server reads it: {one_line(error)}") from error
    return value


def request(message: bytes, max_pixels: int = MAX_PIXELS) -> tuple[dict[str, Any], dict[str, Any]]:
    """The observation of a request, and its options. Raises FrameError, and RequestError for options that are wrong."""
    value = unpack(message, max_pixels)
    if not isinstance(value, dict):
        raise RequestError(f"a request is a map of an observation; got {type(value).__name__}")
    wrong = [key for key in value if not isinstance(key, str)]
    if wrong:
        raise RequestError(f"the keys of an observation are text; got {wrong[0]!r:.80}")
    options = {name: value.pop(name) for name in OPTIONS if name in value}
    expected: dict[str, tuple[type, ...]] = {
        "protocol": (int,),
        "request_id": (int, str),
        "reset": (bool,),
        "subtask": (str,),
        "seed": (int,),
        "noise": (np.ndarray,),
        "prev_chunk": (np.ndarray,),
        "delay": (int,),
        "executed": (int,),
    }
    for name, given in options.items():
        if isinstance(given, np.generic):
            given = options[name] = given.item()
        if not isinstance(given, expected[name]) or (isinstance(given, bool) and name != "reset"):
            kinds = " or ".join(kind.__name__ for kind in expected[name])
            raise RequestError(f"{name} is {given!r:.80}; expected {kinds}")
    if options.get("protocol", PROTOCOL) != PROTOCOL:
        raise RequestError(f"protocol is {options['protocol']}; this server has {PROTOCOL}")
    if len(str(options.get("request_id", ""))) > 64:
        raise RequestError("request_id has more than 64 characters")
    if not 0 <= options.get("seed", 0) < 2**63:
        raise RequestError(f"seed is {options['seed']}; expected 0 to 2**63 - 1")
    if "seed" in options and "noise" in options:
        raise RequestError("noise and seed are two different noises; give one of them")
    if "prev_chunk" in options and "executed" in options:
        raise RequestError("prev_chunk and executed are two different previous chunks; give one of them")
    return value, options


def one_line(error: object, limit: int = 500) -> str:
    """An error's message in one line, without the paths of this machine."""
    text = " ".join(str(error).split())
    text = re.sub(r"(?<![\w:/.])(~|\.{1,2})?/[\w.@+-]+(/[\w.@+-]+)+", "…", text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in REFUSED:
        raise ValueError(f"arrays of dtype {value.dtype} are not sent; convert it, for instance to float32")
    if isinstance(value, np.ndarray):
        return {ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise ValueError(f"{type(value).__name__} is not sent: {value!r:.80}")


def _decode(value: dict[Any, Any], max_pixels: int) -> Any:
    if ARRAY in value:
        return _array(value, max_pixels)
    return _scalar(value) if SCALAR in value else value


def _array(value: dict[Any, Any], max_pixels: int) -> np.ndarray:
    data, shape, dtype = value.get(b"data"), value.get(b"shape"), _dtype(value)
    if not isinstance(data, bytes):
        raise FrameError(f"the data of an array is {type(data).__name__}; expected bytes")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise FrameError(f"the shape of an array is {shape!r:.80}; expected a list of sizes")
    if len(shape) > MAX_DIMS:
        raise FrameError(f"an array has {len(shape)} axes; at most {MAX_DIMS} are read")
    size = math.prod(shape) * dtype.itemsize
    if size != len(data):
        raise FrameError(f"an array {shape} of {dtype} has {size} bytes; the message has {len(data)} of it")
    if len(shape) == 3 and math.prod(shape) // max(min(shape), 1) > max_pixels:
        raise FrameError(f"an image {shape} has more than {max_pixels} pixels")
    return np.ndarray(shape, dtype, data)


def _scalar(value: dict[Any, Any]) -> np.generic:
    data, dtype = value.get(b"data"), _dtype(value)
    kinds: dict[str, tuple[type, ...]] = {"b": (bool,), "S": (bytes,), "U": (str,), "f": (int, float)}
    if not isinstance(data, kinds.get(dtype.kind, (int,))) or (dtype.kind in "iuf" and isinstance(data, bool)):
        raise FrameError(f"a scalar of {dtype} is {data!r:.80}")
    return dtype.type(data)


def _dtype(value: dict[Any, Any]) -> np.dtype:
    name = value.get(b"dtype")
    found = DTYPE.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise FrameError(f"the dtype of an array is {name!r:.80}; expected numbers, bool or text, such as '<f4'")
    try:
        return np.dtype(name)
    except TypeError as error:
        raise FrameError(f"the dtype of an array is {name!r:.80}: {error}") from error


def _check(value: Any) -> None:
    """Raise FrameError for values nested deeper than MAX_DEPTH, and for timestamps and other types of msgpack's."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        wrong = [v for v in level if not isinstance(v, _PLAIN)]
        if wrong:
            raise FrameError(f"the message has a value of type {type(wrong[0]).__name__}")
        inside = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for values in inside for v in values]
        if not level:
            return
    raise FrameError(f"the message is nested deeper than {MAX_DEPTH} levels")


_PLAIN = (type(None), bool, int, float, str, bytes, np.ndarray, np.generic, dict, list)
