"""The bundled recordings: a simulated Sawyer arm in four Meta-World tasks, LeRobot format v3.0."""

from __future__ import annotations

import pathlib

METAWORLD = pathlib.Path(__file__).parent / "metaworld_v30"
