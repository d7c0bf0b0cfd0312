"""The documentation site: ``sphinx-build -W docs site`` (extra ``docs``)."""

from __future__ import annotations

import re

import click
from sphinx.application import Sphinx

import dipgo_deploy

project = "dipgo_deploy"
author = "The dipgo_deploy project"
copyright = author
release = version = dipgo_deploy.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["results/*.json"]

smartquotes = False

html_theme = "furo"
html_title = f"dipgo_deploy {release}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]

# Links to a heading of another page work as on GitHub, and a wrong one is an error.
myst_heading_anchors = 4

# Attributes of a class as a list, without a heading for each.
napoleon_use_ivar = True

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "exclude-members": "model_config, model_post_init, __new__, __init__"}


def examples_as_code(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """Show the example command lines below a command's help as they are typed."""
    examples = [line.lstrip("| ") for line in lines]
    examples = [line for line in examples if line.startswith("dipgo")]
    if examples:
        lines[:] = ["Examples:", "", ".. code-block:: bash", "", *(f"   {line}" for line in examples), ""]


def options_in_groups(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """List the options of a command as its ``--help`` does: in groups, with the default."""
    if not lines:
        return
    lines.clear()
    for group, options in context.command.option_groups(context).items():
        if group != "General":
            lines += [f"*{group}*", ""]
            for names, text in options:
                lines += [f".. option:: {names}", "", f"   {_literal(text)}", ""]


def _literal(text: str) -> str:
    """Help as reStructuredText: nothing in it is markup but backticks."""
    return re.sub(r"([*|_\\])", r"\\\1", text).replace("`", "``")


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("sphinx-click-process-options", options_in_groups)
    app.connect("sphinx-click-process-epilog", examples_as_code)
