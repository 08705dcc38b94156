"""The bundled recordings: a simulated Sawyer arm in four Meta-World tasks, LeRobot format v3.0.

`tokenizer.model` is written by `make_tokenizer.py`, `metaworld_subtasks.jsonl` by `make_subtasks.py`, `fast_tokenizer`
by

    pi0-fit-fast bundled://metaworld_v30 pi0/sample/fast_tokenizer --robot metaworld --action-horizon 10 \\
        --vocab-size 512 --held-out 3 7 11 15
"""

from __future__ import annotations

import pathlib

METAWORLD = pathlib.Path(__file__).parent / "metaworld_v30"
