"""The documentation: `make docs`. Sphinx with MyST and sphinx-book-theme, as JAX and Flax have it; nothing is fetched.

Pages are the Markdown files of this folder, which read as well on the repository's site. The reference is made from
docstrings and from `--help` while the site is built (`docs/reference_pages.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import reference_pages  # noqa: E402

import pi0  # noqa: E402

project, author, copyright = "pi0", "The pi0 authors", "the pi0 authors, Apache-2.0"
version = release = pi0.__version__
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "pi0"
html_theme_options = {
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search is in the sidebar
}
html_last_updated_fmt = ""
suppress_warnings = [
    "misc.highlighting_failure",  # printed output, shown as it is
    "ref.python",  # a type of a signature that both frameworks have: the link goes to one of them
]
highlight_language = "none"
add_module_names = False
toc_object_entries = False

reference_pages.write(Path(__file__).parent / "reference")
