"""The documentation: Sphinx, MyST-NB for pages, sphinx-gallery for examples. Builds offline."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "bilevax"
author = "The bilevax developers"
copyright = "The bilevax developers"
release = version = installed_version("bilevax")

extensions = ["myst_nb", "sphinx_gallery.gen_gallery", "api_directive"]
exclude_patterns = ["_build", "**.ipynb_checkpoints", "auto_examples/**.py", "auto_examples/**.md5"]
# Beside each page sphinx-gallery writes a notebook: MyST-NB would execute it once more.
exclude_patterns += ["auto_examples/*.ipynb"]
default_role = "code"  # single backticks in the text of the examples, as everywhere else
nitpicky = True  # a reference to a name that does not exist is an error

# Pages. Code cells are executed at each build. An exception in one is a warning with its
# traceback, and so fails the build.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "amsmath", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_merge_streams = True

# Examples: every script is executed; what it prints and draws is shown.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 10,
    "write_computation_times": False,
}

highlight_language = "none"  # indented blocks in docstrings are formulas
html_theme = "pydata_sphinx_theme"
html_title = "bilevax"
html_theme_options = {
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "navbar_end": ["theme-switcher"],
}
html_sidebars = {"index": [], "api": [], "faq": [], "choosing": [], "changelog": []}
html_sidebars["leaving-jaxopt"] = []
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["pairs.css"]
