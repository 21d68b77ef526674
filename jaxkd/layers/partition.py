"""How the parameters of a network are split over several devices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

# One entry per axis of an array: the name of a mesh axis, or None.
Spec = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """Which parameters are split over the mesh axis `model`, and along which axis.

    Attributes:
      rules: specs by regular expression. An expression must match a parameter's path
        to its end, from its start or from after a slash; the first that does counts.
        Parameters that none matches are whole on every device.
      units: how many there are of what is split, such as `{"heads": 12}`; the size of
        the mesh axis must divide each number.

    >>> partition = Partition(rules={"hidden/kernel": (None, "model")}, units={})
    >>> partition.spec("block1/hidden/kernel"), partition.spec("head/kernel")
    ((None, 'model'), ())
    """

    rules: Mapping[str, Spec]
    units: Mapping[str, int]

    def spec(self, path: str) -> Spec:
        """The spec of a parameter, empty if it is not split."""
        for pattern, spec in self.rules.items():
            if re.fullmatch(rf"(?:.*/)?(?:{pattern})", path):
                return spec
        return ()


def joined(parts: Mapping[str, Partition | None]) -> Partition | None:
    """The partition of networks whose parameters lie side by side under their names."""
    known = {name: part for name, part in parts.items() if part is not None}
    if not known:
        return None
    return Partition(
        rules={
            rf"{re.escape(name)}/(?:.*/)?(?:{pattern})": spec
            for name, part in known.items()
            for pattern, spec in part.rules.items()
        },
        units={
            f"{unit} of {name}": count
            for name, part in known.items()
            for unit, count in part.units.items()
        },
    )
