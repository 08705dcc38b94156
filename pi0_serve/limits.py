"""What a robot may use of a server, and the sizes of its batches: the numbers that options and readers share."""

from __future__ import annotations

import dataclasses

MAX_MESSAGE = 64 << 20  # bytes: default of a server's limit
MAX_PIXELS = 1 << 24  # of one image
SIZES = (1, 2, 4, 8)  # of batches, for which programs are compiled
WAIT = 0.002  # seconds that a request waits for others to join


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a robot may use: bytes of a message, pixels of an image, connections and requests per second of a key,
    seconds without a request; and `drain`, the seconds that running requests get when the server is told to end.
    """

    max_message: int = MAX_MESSAGE
    max_pixels: int = MAX_PIXELS
    connections: int = 64
    rate: float = 1000.0
    idle: float = 3600.0
    drain: float = 60.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) < 1e12:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be positive")
