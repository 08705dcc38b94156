"""A parameter layout as a declarative table: one invertible `Rule` for each parameter.

Names, axes and sizes of `pi0.parameters` ("our" parameters) are the canonical form; a rule maps one of them to a tensor
("their" tensor) of another checkpoint. Converting A to B applies A's rules backwards, then B's forwards, tensor by
tensor and lazily.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from convert.tensors import Index, Tensor, same_bytes
from pi0.assets import Assets
from pi0.config import KINDS, ModelConfig
from pi0.parameters import LayoutError, Parameter, axes_of, axis_sizes, compare_shapes, lora_of, parameters, scope_of


@dataclasses.dataclass(frozen=True)
class Rule:
    """Maps our parameter `ours` to the tensor `theirs` of another layout.

    Attributes:
        ours: the name in `pi0.parameters`.
        theirs: the tensor's name; `{l}` in it stands for the layer, where layers are not stacked.
        axes: the axes of their tensor, separated by spaces: an axis letter of `pi0.parameters`, `(n h)` for axes
            flattened into one, or a digit, our parameter's index along an axis that stacks several parameters.
    """

    ours: str
    theirs: str
    axes: str

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The axes of their tensor, each as a tuple of letters or of one digit."""
        return [tuple(g.strip("()").split()) for g in re.findall(r"\([^)]*\)|\S+", self.axes)]


def _row(index: Index, name: str, sliced: bool) -> int | slice | None:
    """The part of the first axis that `index` selects; None for all of it."""
    if len(index) > 1 or (index and not sliced):
        raise IndexError(f"{name} cannot be read by {index}")
    return index[0] if index else None


def _is_index(group: tuple[str, ...]) -> bool:
    return group[0].isdigit()


@dataclasses.dataclass(frozen=True)
class Layout:
    """A named table of rules. Rules for parameters that a model does not have are ignored.

    Attributes:
        kinds: the model families that it can hold.
        format: its file format: "orbax", "safetensors" or "npz" (read only).
        root: the key path around an Orbax tree.
        spellings: regular expressions of alternative tensor names, each with its replacement, accepted when reading. A
            tensor that is stored under several names must be identical in all of them.
        unused: tensors that no model of ours has and the original's strict loader expects: optional when reading,
            written as zeros. Their `ours` gives the scope of their axes.
        untied: the rules of embedding and output projection where these differ (`ModelConfig.tied_output`), in a layout
            that has one name for both otherwise; the names in them are not respelled then.
        write_sidecars: writes the sidecar files that the original's loader needs, given the folder, the assets and
            the dtype of the weights.
        check_target: raises LayoutError for assets that the original cannot run, and returns notes on what it will do
            otherwise.
        config_folder: where our `config.json` is written, relative to the checkpoint's folder.
    """

    name: str
    rules: tuple[Rule, ...]
    kinds: tuple[str, ...] = KINDS
    format: str = "orbax"
    root: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    unused: tuple[Rule, ...] = ()
    untied: tuple[Rule, ...] = ()
    write_sidecars: Callable[[Path, Assets, np.dtype], None] | None = None
    check_target: Callable[[Assets], list[str]] | None = None
    config_folder: str = "assets"

    @property
    def writable(self) -> bool:
        """Whether checkpoints can be written in this layout."""
        return self.format != "npz"

    @property
    def has_lora(self) -> bool:
        """Whether it can hold low-rank updates."""
        return any(".lora." in rule.ours for rule in self.rules)

    def rules_for(self, kind: str, lora: tuple[str, ...] = (), tied_output: bool = True) -> list[Rule]:
        """The rules for one model family, exactly one per parameter. Raises LayoutError otherwise."""
        if kind not in self.kinds:
            raise LayoutError(f"the layout {self.name} cannot hold {kind}; it holds {', '.join(self.kinds)}")
        wanted = axes_of(kind, lora, tied_output)
        if not (tied_output or self.untied or any(rule.ours == "paligemma.output" for rule in self.rules)):
            raise LayoutError(
                f"the layout {self.name} has one tensor for the text embedding and the output projection, and those of "
                "this model differ (LeRobot trains them apart): it cannot hold it"
            )
        if lora and not self.has_lora:
            raise LayoutError(f"the layout {self.name} cannot hold LoRA; merge it: --lora merge")
        apart = {} if tied_output else {rule.ours: rule for rule in self.untied}
        rules = [rule for rule in self.rules if rule.ours in wanted and rule.ours not in apart] + list(apart.values())
        names = [rule.ours for rule in rules]
        wrong = sorted({n for n in names if names.count(n) > 1} | (wanted.keys() - set(names)))
        if wrong:
            raise LayoutError(f"the layout {self.name} needs exactly one rule for each of {wrong}")
        return rules

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """All tensors of this layout with their shapes, in a fixed order. Nothing is allocated."""
        return _shapes(self._rules_of(config), config)

    def origins(self, config: ModelConfig) -> dict[str, str]:
        """All tensors of this layout with the name of our parameter that each is, or is a part of.

        For layouts whose tensors are each of one parameter.
        """
        sizes = axis_sizes(config)
        return {
            name: rule.ours
            for rule in self._rules_of(config)
            for name in _names(rule, sizes[scope_of(rule.ours)]["l"] if "{l}" in rule.theirs else 1)
        }

    def _rules_of(self, config: ModelConfig) -> list[Rule]:
        return self.rules_for(config.kind, lora_of(config), config.tied_output)

    def spell(self, name: str, tied_output: bool = True) -> str:
        """The canonical spelling of a tensor name."""
        apart = () if tied_output else [rule.theirs for rule in self.untied]
        for pattern, written in self.spellings:
            if name in apart:
                break
            name = re.sub(pattern, written, name)
        return name

    def unused_tensors(self, config: ModelConfig, dtype: np.dtype) -> dict[str, Tensor]:
        """Zeros for the `unused` tensors."""
        shapes = _shapes((rule for rule in self.unused if axis_sizes(config).get(scope_of(rule.ours))), config)

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return Tensor(shape, dtype, lambda index: np.broadcast_to(np.zeros((), dtype), shape)[index])

        return {name: zeros(shape) for name, shape in shapes.items()}

    def check(self, config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
        """Raise LayoutError unless `found` has exactly this layout's tensors with the shapes of `config`."""
        shapes, spelled = self.shapes(config), {name: self.spell(name, config.tied_output) for name in found}
        known = shapes | _shapes(self.unused, config)
        expected = {name: shape for name, shape in shapes.items() if name not in spelled.values()}
        expected |= {name: known[written] for name, written in spelled.items() if written in known}
        compare_shapes(expected, found, f"a {config.kind} checkpoint in the layout {self.name}")

    def respelled(self, source: Mapping[str, Tensor], tied_output: bool = True) -> dict[str, Tensor]:
        """The tensors of a checkpoint by their canonical spelling."""
        names: dict[str, list[str]] = {}
        for name in source:
            names.setdefault(self.spell(name, tied_output), []).append(name)
        return {name: _one_of({n: source[n] for n in found}) for name, found in names.items()}

    def to_ours(self, config: ModelConfig, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our parameters, read lazily from tensors in this layout. Raises LayoutError unless they fit exactly."""
        self.check(config, {name: tensor.shape for name, tensor in source.items()})
        source = self.respelled(source, config.tied_output)
        table, sizes = parameters(config), axis_sizes(config)
        rules = {rule.ours: rule for rule in self._rules_of(config)}
        return {
            name: _ours_from(rules[name], parameter, sizes[scope_of(name)], source) for name, parameter in table.items()
        }

    def from_ours(self, config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This layout's tensors, read lazily from our parameters. Raises LayoutError unless they fit exactly."""
        table = parameters(config)
        compare_shapes({n: p.shape for n, p in table.items()}, {n: t.shape for n, t in ours.items()}, "our parameters")
        sizes = axis_sizes(config)
        parts: dict[str, list[tuple[Rule, int | None]]] = {}
        for rule in self._rules_of(config):
            stacked = "{l}" in rule.theirs
            names = _names(rule, sizes[scope_of(rule.ours)]["l"] if stacked else 1)
            for layer, name in enumerate(names):
                parts.setdefault(name, []).append((rule, layer if stacked else None))
        shapes = self.shapes(config)
        return {name: _theirs_from(name, shapes[name], parts[name], table, ours) for name in shapes}


def _shapes(rules: Iterable[Rule], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of some rules with their shapes, without those of parts that the model does not have."""
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
    """The tensor stored under all of these names. Reading it raises LayoutError where two copies differ."""
    (first, tensor), *others = copies.items()
    if not others:
        return tensor

    def read(index: Index) -> np.ndarray:
        array = tensor.read(index)
        for name, other in others:
            copy = other.read(index)
            if not same_bytes(copy, array):
                raise LayoutError(f"{first} and {name} are the same tensor in this layout, but their values differ")
        return array

    return dataclasses.replace(tensor, read=read)


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
        """Their tensor `name` in our axes; only `row` of our first axis where it is given."""
        index: Index = tuple(
            int(g[0]) if _is_index(g) else row if row is not None and g == (first,) else slice(None)
            for g in rule.groups
        )
        letters = [a for g, i in zip(rule.groups, index, strict=True) if isinstance(i, slice) for a in g]
        rows = {first: len(range(parameter.shape[0])[row])} if isinstance(row, slice) else {}
        array = source[name].read(index).reshape([(sizes | rows)[a] for a in letters])
        return array.transpose([letters.index(a) for a in parameter.axes if a in letters])

    # Whether our axes are theirs, only in another order, so that any index of ours is one of theirs.
    renamed = "{l}" not in rule.theirs and all(len(group) == 1 for group in rule.groups)
    anyhow = renamed and source[names[0]].anyhow

    def read(index: Index) -> np.ndarray:
        if anyhow and len(index) == len(parameter.axes) and all(isinstance(i, slice) for i in index):
            ours = dict(zip(parameter.axes, index, strict=True))
            array = source[names[0]].read(tuple(int(g[0]) if _is_index(g) else ours[g[0]] for g in rule.groups))
            letters = [g[0] for g in rule.groups if not _is_index(g)]
            return array.transpose([letters.index(a) for a in parameter.axes])
        row = _row(index, rule.ours, sliced)
        if "{l}" not in rule.theirs:
            return one(names[0], row)
        if isinstance(row, int):
            return one(names[row], None)
        return np.stack([one(name, None) for name in names[row or slice(None)]])

    return Tensor(parameter.shape, dtypes.pop(), read, sliced, anyhow)


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
    # Sliceable if their first axis is the first axis of all our parameters in it.
    sliced = all(
        layer is None and rule.groups[0] == table[rule.ours].axes[:1] and ours[rule.ours].sliced
        for rule, layer in parts
    )

    def part(rule: Rule, row: int | slice | None) -> np.ndarray:
        """Our parameter with their order and flattening of axes, without index axes."""
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
    """The sizes of axis letters by scope, inferred from shapes. Raises LayoutError where two shapes disagree."""
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
            if not _is_index(group):
                _unify(scope, " ".join(group), size, name)  # flat axes by all of their letters
    return {scope: {a: size for a, (size, _) in letters.items()} for scope, letters in sizes.items()}


def _unify(scope: dict[str, tuple[int, str]], letter: str, size: int, name: str) -> None:
    known = scope.setdefault(letter, (size, name))
    if known[0] != size:
        raise LayoutError(f"{name}: size {size} of the axis {letter}, but {known[0]} in {known[1]}")
