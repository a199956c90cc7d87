"""The site: `sphinx-build -W --keep-going -b html docs docs/_build` after `pip install -e '.[docs]'`."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for the extension docstrings

project = "trl-miso"
author = "The trl-miso contributors"
copyright = author
release = version = version_of("trl-miso")

extensions = ["myst_parser", "docstrings"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# A docstring may link to what has no page here.
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = f"trl-miso {release}"
html_theme_options = {
    "source_repository": "https://github.com/trl-miso/trl-miso/",
    "source_branch": "main",
    "source_directory": "docs/",
}
