"""How one side of a comparison is computed: framework, dtype, plain or sampler, attention, compiled or not, device."""

from __future__ import annotations

import dataclasses
import importlib.util

from pi0.config import DTYPES, PROOF_DTYPE
from pi0.policy.manifest import FORMATS

FRAMEWORKS = ("jax", "torch")
SIDES = (*FRAMEWORKS, *FORMATS)  # an export runs as its format says
PATHS = ("plain", "sampler")
DEVICES = ("cpu", "cuda")
# Of the plain model in JAX, and of the sampler in PyTorch.
ATTENTIONS = {("jax", "plain"): ("xla", "cudnn"), ("torch", "sampler"): ("sdpa", "flex", "flash", "eager")}
IN_FLOAT64 = ("sdpa", "flex", "eager")  # the other kernels have float32 sums inside: a proof has the default for them


class SideError(ValueError):
    """A side that cannot be computed; the message says what is allowed."""


@dataclasses.dataclass(frozen=True)
class Side:
    """Attributes:
    framework: "jax", "torch" or the format of an export; None as the checkpoint's file format or the export has it.
    path: the model's own `sample` with every stage before it ("plain"), or its `Sampler`, which has actions alone.
    attention: by name; None for the default.
    dtype: the compute dtype; None for the comparison's.
    compiled: whether a program is compiled; default: JAX compiles, PyTorch does not.
    device: "cpu" or "cuda"; None for the framework's default in JAX, and the CPU in PyTorch.
    """

    framework: str | None = None
    path: str = "plain"
    attention: str | None = None
    dtype: str | None = None
    compiled: bool | None = None
    device: str | None = None

    @classmethod
    def parse(cls, text: str) -> Side:
        """A side in words with colons between them: "torch:sampler:flex". Raises SideError."""
        found: dict[str, str | bool] = {}
        names = {name for kinds in ATTENTIONS.values() for name in kinds}
        fields: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("framework", SIDES),
            ("path", PATHS),
            ("dtype", DTYPES),
            ("device", DEVICES),
            ("compiled", ("compiled", "uncompiled")),
            ("attention", tuple(sorted(names))),
        )
        for word in text.split(":"):
            field = next((field for field, words in fields if word in words), None)
            if field is None:
                known = ", ".join(word for _, words in fields for word in words)
                raise SideError(f"side {text!r}: {word!r} is none of {known}")
            if field in found:
                raise SideError(f"side {text!r} has two words for its {field}")
            found[field] = word == "compiled" if field == "compiled" else word
        return cls(**found)  # type: ignore[arg-type]

    def of(self, framework: str, dtype: str) -> Side:
        """With what is left open decided. Raises SideError where that framework does not have it."""
        side = dataclasses.replace(self, framework=self.framework or framework, dtype=self.dtype or dtype)
        assert side.framework is not None
        if side.framework in FORMATS:
            own = (self.path != "plain" and self.path, self.attention, self.dtype, self.compiled is not None)
            if any(own):
                raise SideError(f"side {side}: an export has its path, attention and dtype in its programs; leave them")
            return side
        known = ATTENTIONS.get((side.framework, side.path), ())
        if side.attention is not None and side.attention not in known:
            raise SideError(
                f"side {side}: {side.framework} {side.path} has attention {', '.join(known) or 'by default'}"
            )
        if side.compiled and (side.framework, side.path) == ("torch", "plain"):
            raise SideError(f"side {side}: the plain model in PyTorch is not compiled; use sampler")
        if side.compiled is False and (side.framework, side.path) == ("jax", "sampler"):
            raise SideError(f"side {side}: the sampler in JAX is always compiled")
        return side

    @property
    def proof(self) -> Side:
        """The same in float64, on the CPU."""
        attention = self.attention if self.attention in IN_FLOAT64 else None
        compiled = None if self.framework == "jax" else False
        return dataclasses.replace(self, dtype=PROOF_DTYPE, attention=attention, compiled=compiled, device=None)

    def __str__(self) -> str:
        words = [self.framework, self.path, self.attention, self.dtype, self.device]
        if self.compiled is not None:
            words.append("compiled" if self.compiled else "uncompiled")
        return ":".join(word for word in words if word)


def available(tokens: bool) -> list[Side]:
    """Every side that this machine has: of models that write `tokens`, or actions."""
    sides = [Side("jax"), Side("jax", "sampler")] if importlib.util.find_spec("jax") else []
    sides += [Side("jax", attention="xla")] if sides else []
    if importlib.util.find_spec("torch"):
        import torch

        attentions = ("eager",) if tokens else ("eager", "sdpa", "flex")
        each = [Side("torch"), *(Side("torch", "sampler", name) for name in attentions)]
        sides += each
        if torch.cuda.is_available():
            sides += [dataclasses.replace(side, device="cuda") for side in each]
    return sides
