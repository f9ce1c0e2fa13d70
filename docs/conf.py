"""Sphinx configuration: ``bash scripts/docs.sh``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs" / "_extensions")]

from dosmatgen_ase import __version__  # noqa: E402  # of this checkout

# The notebooks run beside the data, on one thread, and as quietly as a page wants them.
os.environ.update(
    DOSMATGEN_ROOT=str(ROOT),
    OMP_NUM_THREADS="1",
    PYTHONPATH=str(ROOT / "src"),
    PYTHONWARNINGS="ignore",
    TQDM_DISABLE="1",
)

project = "dosmatgen-ase"
author = "dosmatgen-ase developers"
copyright = author
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "typer_help",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "code"

myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "notebooks")
nb_execution_timeout = 240
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_ipywidgets_js = {}  # no page needs a network

autosummary_generate = True
autodoc_typehints = "none"  # the docstrings say it in words
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
viewcode_line_numbers = True
copybutton_exclude = ".linenos, .gp, .go"

linkcheck_ignore = [r"https?://.*"]  # internal links alone: the build needs no network

html_theme = "pydata_sphinx_theme"
html_title = "dosmatgen-ase"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "dosmatgen-ase"},
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
