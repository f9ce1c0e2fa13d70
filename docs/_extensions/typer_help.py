"""The directive ``typer-help``: every command of a Typer application, with its options, from its own help.

sphinx-click does not know Typer's own copy of Click.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import typer
from docutils.nodes import Node
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class TyperHelp(SphinxDirective):
    """``.. typer-help:: module:app``."""

    required_arguments = 1

    def run(self) -> list[Node]:
        """Parse the help as Markdown, the language of the page."""
        module, _, name = self.arguments[0].partition(":")
        application = typer.main.get_command(getattr(import_module(module), name))
        lines = [line for command in application.commands.values() for line in described(command)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def described(command: Any) -> Iterator[str]:
    """One command in Markdown: its usage, its help, and a table for each group of options."""
    shown = [param for param in command.params if not getattr(param, "hidden", False)]
    arguments = [param for param in shown if param.param_type_name == "argument"]
    yield from (f"## {command.name}", "", "```text")
    yield " ".join(["dosmatgen", command.name, *command.collect_usage_pieces(command.context_class(command))])
    yield from ("```", "")
    yield from (re.sub(r"\s*\n\s*", " ", part) + "\n" for part in (command.help or "").split("\n\n"))
    groups: dict[str, list[Any]] = {}
    for param in shown:
        default = "Arguments" if param in arguments else "Options"
        groups.setdefault(getattr(param, "rich_help_panel", None) or default, []).append(param)
    for group, params in groups.items():
        yield from (f"{group}", "", "| | | default |", "|---|---|---|")
        for param in params:
            names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
            default = "" if param.default in (None, False, ()) or callable(param.default) else f"`{param.default}`"
            text = " ".join((getattr(param, "help", None) or "").split()).replace("|", "\\|")
            yield f"| {names} | {text} | {default} |"
        yield ""


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("typer-help", TyperHelp)
    return {"parallel_read_safe": True}
