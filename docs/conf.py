"""Sphinx: python -m sphinx -W -b html docs docs/_build/html"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[1]))

import flask_natspubsub
from docs import generated

project = "Flask-NatsPubsub"
copyright = "The Flask-NatsPubsub authors"
version = release = flask_natspubsub.__version__

extensions = ["sphinx.ext.autodoc", "myst_parser"]
myst_enable_extensions = ["deflist"]
exclude_patterns = [
    "_build",
    "performance-growth.rst",  # included by performance.rst
    "performance-table.rst",
    "reliability",  # the parts of reliability.md
]
smartquotes = False  # the texts of settings and errors quote code

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["extra.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b6e4f",
        "color-brand-content": "#0b6e4f",
    },
    "dark_css_variables": {
        "color-brand-primary": "#4cc38a",
        "color-brand-content": "#4cc38a",
    },
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def _directive(text: Callable[[], str]) -> type[SphinxDirective]:
    class Generated(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_dependency(flask_natspubsub.config.settings.__file__)
            return self.parse_text_to_nodes(text(), allow_section_headings=True)

    return Generated


def setup(app: Sphinx) -> None:
    app.add_directive("settings-table", _directive(generated.settings_text))
    app.add_directive("commands", _directive(generated.commands_text))
    app.add_directive("settings-presets", _directive(generated.presets_text))
