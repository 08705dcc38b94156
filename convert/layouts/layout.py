"""A layout is a table: one `Rule` for each of our parameters, readable in both directions.

Our JAX names, axes and sizes (`parameters`) are the common ground; a layout says where each of them lies in another
checkpoint. Conversion from A to B is A's table backwards, then B's forwards, tensor by tensor and lazily.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from pi0.config import KINDS, GemmaConfig, ModelConfig


class LayoutError(ValueError):
    """A checkpoint does not fit a layout; the message names the tensors."""


Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A named array that is read only when asked: `read(())` gives all of it, `read(index)` a part.

    Stored tensors take any basic index; tensors that a table makes take `()` and, where they are `sliced`, an index or
    a slice of the first axis alone.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    sliced: bool = True

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def cast(self, dtype: np.dtype) -> Tensor:
        """The same in another dtype."""
        if self.dtype == dtype:
            return self
        return dataclasses.replace(self, dtype=dtype, read=lambda index: self.read(index).astype(dtype))

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        """A tensor that is in memory already."""
        return cls(array.shape, array.dtype, lambda index: array[index])


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of our parameters: its axes as letters (`l` = stacked layers), and their sizes."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]


_NORMS = ("attention_norm", "mlp_norm")

# Axes. vision: l layers, p q patch, c channels, s tokens, d width, n heads, h head dim, m mlp, w PaliGemma's width.
# Gemma: l layers, v vocabulary, d width, n heads, k key/value heads, h head dim, m mlp, t three widths.
# Projections: a action dim, d and e the action expert's width, u twice that width.
_VISION = {
    "patch_embedding.kernel": "p q c d",
    "patch_embedding.bias": "d",
    "position_embedding": "s d",
    **{f"layers.{norm}.{part}": "l d" for norm in _NORMS for part in ("scale", "bias")},
    **{f"layers.attention.{x}.kernel": "l d n h" for x in ("query", "key", "value")},
    **{f"layers.attention.{x}.bias": "l n h" for x in ("query", "key", "value")},
    "layers.attention.out.kernel": "l n h d",
    "layers.attention.out.bias": "l d",
    "layers.mlp.up.kernel": "l d m",
    "layers.mlp.up.bias": "l m",
    "layers.mlp.down.kernel": "l m d",
    "layers.mlp.down.bias": "l d",
    "final_norm.scale": "d",
    "final_norm.bias": "d",
    "head.kernel": "d w",
    "head.bias": "w",
}
_GEMMA = {
    "layers.attention.query.kernel": "l d n h",
    "layers.attention.key.kernel": "l d k h",
    "layers.attention.value.kernel": "l d k h",
    "layers.attention.out.kernel": "l n h d",
    "layers.mlp.gate.kernel": "l d m",
    "layers.mlp.up.kernel": "l d m",
    "layers.mlp.down.kernel": "l m d",
}
# r rank; see `pi0_jax.models.lora`.
_LORA = {
    "layers.attention.query.lora.a": "l d n r",
    "layers.attention.query.lora.b": "l n r h",
    **{f"layers.attention.{x}.lora.a": "l d k r" for x in ("key", "value")},
    **{f"layers.attention.{x}.lora.b": "l k r h" for x in ("key", "value")},
    "layers.attention.out.lora.a": "l n h r",
    "layers.attention.out.lora.b": "l n r d",
    **{f"layers.mlp.{x}.lora.a": "l d r" for x in ("gate", "up")},
    **{f"layers.mlp.{x}.lora.b": "l r m" for x in ("gate", "up")},
    "layers.mlp.down.lora.a": "l m r",
    "layers.mlp.down.lora.b": "l r d",
}
_PLAIN_NORMS = {**{f"layers.{norm}.scale": "l d" for norm in _NORMS}, "final_norm.scale": "d"}
_ADAPTIVE_NORMS = {
    **{f"layers.{norm}.modulation.kernel": "l d t" for norm in _NORMS},
    **{f"layers.{norm}.modulation.bias": "l t" for norm in _NORMS},
    "final_norm.modulation.kernel": "d t",
    "final_norm.modulation.bias": "t",
}
_PROJECTIONS = {
    "pi0": {"action_in_proj": "a d", "state_proj": "a d", "action_time_mlp_in": "u d", "action_time_mlp_out": "d e"},
    "pi05": {"action_in_proj": "a d", "time_mlp_in": "d e", "time_mlp_out": "d e"},
}


EXPERTS = ("paligemma", "action_expert")


def experts_of(kind: str) -> tuple[str, ...]:
    """The experts that a kind of model has."""
    return EXPERTS[:1] if kind == "pi0_fast" else EXPERTS


def lora_of(config: ModelConfig) -> tuple[str, ...]:
    """The experts that have low-rank updates."""
    return tuple(expert for expert in experts_of(config.kind) if getattr(config, expert).lora_rank is not None)


def axes_of(kind: str, lora: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """Our parameters of a kind of model, where the experts `lora` have low-rank updates, and their axes."""
    table = {
        **{f"vision.{name}": axes for name, axes in _VISION.items()},
        "paligemma.embedding": "v d",
        **{f"paligemma.{name}": axes for name, axes in (_GEMMA | _PLAIN_NORMS).items()},
        **{f"{expert}.{name}": axes for expert in lora for name, axes in _LORA.items()},
    }
    if "action_expert" in experts_of(kind):
        norms = _ADAPTIVE_NORMS if kind == "pi05" else _PLAIN_NORMS
        projections = _PROJECTIONS[kind] | {"action_out_proj": "d a"}
        table |= {f"action_expert.{name}": axes for name, axes in (_GEMMA | norms).items()}
        table |= {f"{name}.kernel": axes for name, axes in projections.items()}
        table |= {f"{name}.bias": axes.split()[1] for name, axes in projections.items()}
    return {name: tuple(axes.split()) for name, axes in table.items()}


def scope_of(name: str) -> str:
    """Which part's sizes the axes of our parameter `name` have."""
    first = name.split(".")[0]
    return first if first in ("vision", "paligemma", "action_expert") else "projections"


def axis_sizes(config: ModelConfig) -> dict[str, dict[str, int]]:
    """The size of every axis letter, for each scope."""
    vision = config.vision

    def gemma(expert: GemmaConfig) -> dict[str, int]:
        sizes = {"l": expert.depth, "d": expert.width, "t": 3 * expert.width, "m": expert.mlp_dim}
        sizes |= {"n": expert.num_heads, "k": expert.num_kv_heads, "h": expert.head_dim}
        return sizes if expert.lora_rank is None else sizes | {"r": expert.lora_rank}

    sizes = {
        "vision": {
            **{"l": vision.depth, "d": vision.width, "n": vision.num_heads, "h": vision.head_dim},
            **{"p": vision.patch_size, "q": vision.patch_size, "c": 3, "s": config.image_tokens},
            **{"m": vision.mlp_dim, "w": config.paligemma.width},
        },
        "paligemma": {**gemma(config.paligemma), "v": config.vocab_size},
    }
    if config.action_expert is not None:
        width = config.action_expert.width
        sizes["action_expert"] = {**gemma(config.action_expert), "v": config.vocab_size}
        sizes["projections"] = {"a": config.action_dim, "d": width, "e": width, "u": 2 * width}
    return sizes


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """All of our parameters in JAX: names, axes and shapes; nothing is allocated."""
    sizes = axis_sizes(config)
    return {
        name: Parameter(axes, tuple(sizes[scope_of(name)][a] for a in axes))
        for name, axes in axes_of(config.kind, lora_of(config)).items()
    }


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where our parameter `ours` lies in another layout.

    `theirs` is the tensor's name there; `{l}` in it means one tensor for each layer. `axes` are the axes of that
    tensor: a letter of ours; a digit, for the index at which ours lies along an axis that several of ours share; or
    `(n h)`, for axes that are flattened into one.
    """

    ours: str
    theirs: str
    axes: str

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The axes of their tensor, each as the letters (or the digit) in it."""
        return [tuple(g.strip("()").split()) for g in re.findall(r"\([^)]*\)|\S+", self.axes)]


def _row(index: Index, name: str, sliced: bool) -> int | slice | None:
    """What of its first axis a table's tensor is asked for; None for all of it."""
    if len(index) > 1 or (index and not sliced):
        raise IndexError(f"{name} cannot be read by {index}")
    return index[0] if index else None


def _is_index(group: tuple[str, ...]) -> bool:
    return group[0].isdigit()


@dataclasses.dataclass(frozen=True)
class Layout:
    """A named table of rules. Rules for parameters that a model does not have are passed over.

    `kinds` are those it has a place for; `format` is that of its files, "orbax", "safetensors" or "npz", which is only
    read; `root` the keys around an Orbax tree. `spellings` are
    patterns of other names for its tensors, each with its replacement: they are read, not written, and a tensor that
    is there under several names must be the same in all. `unused` are tensors that no model of ours has (`ours` says
    where they would be) and none uses: they may be there, in that shape; the strict loaders of such a layout want
    them, so they are written, as zeros.
    """

    name: str
    rules: tuple[Rule, ...]
    kinds: tuple[str, ...] = KINDS
    format: str = "orbax"
    root: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    unused: tuple[Rule, ...] = ()

    @property
    def has_lora(self) -> bool:
        """Whether low-rank updates have a place in it."""
        return any(".lora." in rule.ours for rule in self.rules)

    def rules_for(self, kind: str, lora: tuple[str, ...] = ()) -> list[Rule]:
        """The rules of one kind of model: exactly one for each of our parameters. Raises LayoutError otherwise."""
        if kind not in self.kinds:
            raise LayoutError(f"the layout {self.name} has no place for {kind}; it is one of {', '.join(self.kinds)}")
        wanted = axes_of(kind, lora)
        if lora and not self.has_lora:
            raise LayoutError(f"the layout {self.name} has no place for LoRA; merge it: --lora merge")
        rules = [rule for rule in self.rules if rule.ours in wanted]
        names = [rule.ours for rule in rules]
        wrong = sorted({n for n in names if names.count(n) > 1} | (wanted.keys() - set(names)))
        if wrong:
            raise LayoutError(f"the layout {self.name} has not exactly one rule for {wrong}")
        return rules

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Every tensor of this layout and its shape, in a fixed order; nothing is allocated."""
        return _shapes(self.rules_for(config.kind, lora_of(config)), config)

    def spell(self, name: str) -> str:
        """The name that this layout writes for a tensor found as `name`."""
        for pattern, written in self.spellings:
            name = re.sub(pattern, written, name)
        return name

    def unused_tensors(self, config: ModelConfig, dtype: np.dtype) -> dict[str, Tensor]:
        """Zeros for the tensors that its own models have and never use."""
        shapes = _shapes((rule for rule in self.unused if axis_sizes(config).get(scope_of(rule.ours))), config)

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return Tensor(shape, dtype, lambda index: np.broadcast_to(np.zeros((), dtype), shape)[index])

        return {name: zeros(shape) for name, shape in shapes.items()}

    def check(self, config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
        """Raise LayoutError unless `found` has exactly this layout's tensors, in these shapes."""
        shapes, spelled = self.shapes(config), {name: self.spell(name) for name in found}
        known = shapes | _shapes(self.unused, config)
        expected = {name: shape for name, shape in shapes.items() if name not in spelled.values()}
        expected |= {name: known[written] for name, written in spelled.items() if written in known}
        compare_shapes(expected, found, f"a {config.kind} checkpoint in the layout {self.name}")

    def respelled(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint by the names that this layout writes."""
        names: dict[str, list[str]] = {}
        for name in source:
            names.setdefault(self.spell(name), []).append(name)
        return {name: _one_of({n: source[n] for n in found}) for name, found in names.items()}

    def to_ours(self, config: ModelConfig, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our parameters, read lazily from a checkpoint in this layout. Raises LayoutError unless it fits exactly."""
        self.check(config, {name: tensor.shape for name, tensor in source.items()})
        source = self.respelled(source)
        table, sizes = parameters(config), axis_sizes(config)
        rules = {rule.ours: rule for rule in self.rules_for(config.kind, lora_of(config))}
        return {
            name: _ours_from(rules[name], parameter, sizes[scope_of(name)], source) for name, parameter in table.items()
        }

    def from_ours(self, config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This layout's tensors, read lazily from our parameters. Raises LayoutError unless those are complete."""
        table = parameters(config)
        compare_shapes({n: p.shape for n, p in table.items()}, {n: t.shape for n, t in ours.items()}, "our parameters")
        sizes = axis_sizes(config)
        parts: dict[str, list[tuple[Rule, int | None]]] = {}
        for rule in self.rules_for(config.kind, lora_of(config)):
            stacked = "{l}" in rule.theirs
            names = _names(rule, sizes[scope_of(rule.ours)]["l"] if stacked else 1)
            for layer, name in enumerate(names):
                parts.setdefault(name, []).append((rule, layer if stacked else None))
        shapes = self.shapes(config)
        return {name: _theirs_from(name, shapes[name], parts[name], table, ours) for name in shapes}


def _shapes(rules: Iterable[Rule], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of some rules and its shape; of parts that the model does not have, none."""
    sizes = axis_sizes(config)
    shapes: dict[str, list[int]] = {}
    for rule in rules:
        if scope_of(rule.ours) not in sizes:
            continue
        scope = sizes[scope_of(rule.ours)]
        for name in _names(rule, scope["l"] if "{l}" in rule.theirs else 1):
            shape = shapes.setdefault(name, [0] * len(rule.groups))
            for i, group in enumerate(rule.groups):
                size = int(group[0]) + 1 if _is_index(group) else int(np.prod([scope[a] for a in group]))
                shape[i] = max(shape[i], size)
    return {name: tuple(shape) for name, shape in shapes.items()}


def _one_of(copies: Mapping[str, Tensor]) -> Tensor:
    """The tensor that is stored under all of these names; LayoutError names two that differ, once they are read."""
    (first, tensor), *others = copies.items()
    if not others:
        return tensor

    def read(index: Index) -> np.ndarray:
        array = tensor.read(index)
        for name, other in others:
            copy = other.read(index)
            if not same_bytes(copy, array):
                raise LayoutError(f"{first} and {name} are one tensor in this layout, but their values differ")
        return array

    return dataclasses.replace(tensor, read=read)


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal in dtype, shape and every bit."""
    bits_a, bits_b = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits_a, bits_b)


def compare_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise LayoutError that names every tensor that is missing, unknown or of another shape."""
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"unknown {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise LayoutError(f"{what}: {len(problems)} tensors do not fit:\n  {shown}{more}")


def _names(rule: Rule, layers: int) -> list[str]:
    if "{l}" not in rule.theirs:
        return [rule.theirs]
    return [rule.theirs.replace("{l}", str(layer)) for layer in range(layers)]


def _ours_from(rule: Rule, parameter: Parameter, sizes: dict[str, int], source: Mapping[str, Tensor]) -> Tensor:
    names, first = _names(rule, parameter.shape[0]), parameter.axes[0]
    sliced = "{l}" in rule.theirs or (first,) in rule.groups
    dtypes = {source[name].dtype for name in names}
    if len(dtypes) > 1:
        raise LayoutError(f"{rule.theirs}: layers have different dtypes {sorted(str(d) for d in dtypes)}")

    def one(name: str, row: int | slice | None) -> np.ndarray:
        """Their tensor `name`, as ours; only a part of our first axis where `row` is given."""
        index: Index = tuple(
            int(g[0]) if _is_index(g) else row if row is not None and g == (first,) else slice(None)
            for g in rule.groups
        )
        letters = [a for g, i in zip(rule.groups, index, strict=True) if isinstance(i, slice) for a in g]
        rows = {first: len(range(parameter.shape[0])[row])} if isinstance(row, slice) else {}
        array = source[name].read(index).reshape([(sizes | rows)[a] for a in letters])
        return array.transpose([letters.index(a) for a in parameter.axes if a in letters])

    def read(index: Index) -> np.ndarray:
        row = _row(index, rule.ours, sliced)
        if "{l}" not in rule.theirs:
            return one(names[0], row)
        if isinstance(row, int):
            return one(names[row], None)
        return np.stack([one(name, None) for name in names[row or slice(None)]])

    return Tensor(parameter.shape, dtypes.pop(), read, sliced)


def _theirs_from(
    name: str,
    shape: tuple[int, ...],
    parts: list[tuple[Rule, int | None]],
    table: Mapping[str, Parameter],
    ours: Mapping[str, Tensor],
) -> Tensor:
    dtypes = {ours[rule.ours].dtype for rule, _ in parts}
    if len(dtypes) > 1:
        raise LayoutError(f"{name}: its parts have different dtypes {sorted(str(d) for d in dtypes)}")
    dtype = dtypes.pop()
    # Where their first axis is that of all our parameters in it, a part of it is a part of those.
    sliced = all(
        layer is None and rule.groups[0] == table[rule.ours].axes[:1] and ours[rule.ours].sliced
        for rule, layer in parts
    )

    def part(rule: Rule, row: int | slice | None) -> np.ndarray:
        """Our parameter with their order and flattening of axes, digits left out."""
        axes = table[rule.ours].axes[1:] if isinstance(row, int) else table[rule.ours].axes
        array = ours[rule.ours].read(() if row is None else (row,))
        groups = [[a for a in g if a in axes] for g in rule.groups if not _is_index(g)]
        array = array.transpose([axes.index(a) for g in groups for a in g])
        lengths = iter(array.shape)
        return array.reshape([int(np.prod(list(itertools.islice(lengths, len(g))))) for g in groups if g])

    def read(index: Index) -> np.ndarray:
        row = _row(index, name, sliced)
        if not any(_is_index(g) for g in parts[0][0].groups):
            rule, layer = parts[0]
            return part(rule, row if layer is None else layer)
        rows = (len(range(shape[0])[row]),) if isinstance(row, slice) else () if isinstance(row, int) else shape[:1]
        out = np.empty((*rows, *shape[1:]), dtype)
        for rule, layer in parts:
            groups = rule.groups[1:] if isinstance(row, int) else rule.groups
            where = tuple(int(g[0]) if _is_index(g) else slice(None) for g in groups)
            out[where] = part(rule, row if layer is None else layer)
        return out

    return Tensor(shape, dtype, read, sliced)


def infer_sizes(rules: Iterable[Rule], found: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, int]]:
    """The size of every axis letter that follows from their shapes. Raises LayoutError where two shapes disagree."""
    sizes: dict[str, dict[str, tuple[int, str]]] = {}
    for rule in rules:
        scope = sizes.setdefault(scope_of(rule.ours), {})
        name = rule.theirs.replace("{l}", "0")
        if "{l}" in rule.theirs:
            pattern = re.compile(re.escape(rule.theirs).replace(r"\{l\}", r"\d+"))
            _unify(scope, "l", sum(bool(pattern.fullmatch(n)) for n in found), rule.theirs)
        if name not in found or len(found[name]) != len(rule.groups):
            raise LayoutError(f"{name}: expected a tensor with axes [{rule.axes}], found {found.get(name, 'none')}")
        for group, size in zip(rule.groups, found[name], strict=True):
            if len(group) == 1 and not _is_index(group):
                _unify(scope, group[0], size, name)
    return {scope: {a: size for a, (size, _) in letters.items()} for scope, letters in sizes.items()}


def _unify(scope: dict[str, tuple[int, str]], letter: str, size: int, name: str) -> None:
    known = scope.setdefault(letter, (size, name))
    if known[0] != size:
        raise LayoutError(f"{name} says {size} for the axis {letter}, but {known[1]} says {known[0]}")
