"""Configuration of the documentation: `make docs` builds it, warnings are errors."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import metadata
from pathlib import Path

from sphinx.ext.napoleon.docstring import NumpyDocstring

HERE = Path(__file__).parent

# -- Project ----------------------------------------------------------------------------------------------------------

info = metadata("stgen")
project = info["Name"]
author = "The stgen developers"
copyright = author
release = version = info["Version"]

# -- Sources ----------------------------------------------------------------------------------------------------------

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "Thumbs.db", ".DS_Store", "**.ipynb_checkpoints", "jupyter_execute"]
default_role = "literal"

os.environ.pop("MPLBACKEND", None)  # a backend named by the shell would keep figures out of the executed notebooks

# Links into other projects' documentation need their inventories from the network. They are a courtesy of the published
# pages, so they are made where those are built, and a build elsewhere never depends on somebody else's server.
if os.environ.get("READTHEDOCS") == "True":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3/", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
        "spatialdata": ("https://spatialdata.scverse.org/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }

# -- Markdown and notebooks -------------------------------------------------------------------------------------------

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# The tutorials live beside the package and are run at every build: they cannot drift from it. Read the Docs, which has no time
# for it, shows the outputs that `make tutorials` kept.
shutil.rmtree(HERE / "tutorials", ignore_errors=True)
(HERE / "tutorials").mkdir()
for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
    shutil.copy(notebook, HERE / "tutorials")
nb_execution_mode = (
    "off" if os.environ.get("READTHEDOCS") == "True" else "force"
)  # `make docs SPHINX_ARGS="-D nb_execution_mode=off"` while writing
nb_execution_timeout = 900  # seconds per cell
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True

# -- References -------------------------------------------------------------------------------------------------------

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

# -- API --------------------------------------------------------------------------------------------------------------

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = False
napoleon_use_ivar = True


def _parse_returns(self: NumpyDocstring, section: str) -> list[str]:
    """Take a "Returns" section as prose: our types stand in the signature only, never at the start of the text."""
    lines = self._dedent(self._consume_to_next_section())
    return [*self._format_block(":returns: ", lines), ""]


NumpyDocstring._parse_returns_section = _parse_returns

# -- HTML -------------------------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search field is in the sidebar
    "path_to_docs": "docs",
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
}
html_static_path = ["_static"]
html_css_files = ["stgen.css"]
html_title = f"stgen {version}"
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
