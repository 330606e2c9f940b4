"""Settings of the book (Sphinx). build.py puts its sources together beside a copy of this file."""

import os
import sys
from pathlib import Path

# build.py names the project's folder; the sources are a copy.
ROOT = Path(os.environ["BEYOND_DPO_ROOT"])
sys.path.insert(0, str(ROOT / "lib"))

from beyond_dpo import __version__  # noqa: E402

project = "Beyond DPO"
author = "The Beyond DPO contributors"
version = release = __version__
language = "en"

extensions = ["myst_nb"]
# Nothing is executed: the notebooks are shown as they are committed.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["data", "figures"]
suppress_warnings = [
    "mystnb.unknown_mime_type",
    "misc.highlighting_failure",  # tables of files and pseudo-code are no language
    "myst.header",  # notebooks whose sections begin at the second level
]

linkcheck_ignore = [r"https?://"]  # what the project does not hold itself

html_theme = "sphinx_book_theme"
html_title = "Beyond DPO"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_js_files = ["scoreboard.js"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
# Buttons for Binder and Colab need the repository's address, which only the publisher knows.
REPOSITORY = os.environ.get("REPOSITORY", "")
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }
