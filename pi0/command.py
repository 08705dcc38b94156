"""What all commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from pi0.fetch import local_path


def output_path(text: str) -> Path:
    """The type of an argument that names a file or folder to write."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
