"""Pages of the site that are made from other files, for mkdocs."""

import argparse
import ast
import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "respodiff_jax"
CARD = "respodiff_jax/emoji/MODEL_CARD.md"


def on_files(files, config):
    """Adds the pages; on disk there are none."""
    pages = {"cli.md": command_line(), "deviations.md": deviations(), "emoji_world.md": card()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, **_):
    """Links to files outside docs/ name the file instead: the site has only its own pages."""
    markdown = markdown.replace(f"](../{CARD}", "](emoji_world.md")
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)", r"\1 (`\2`)", markdown)


def card() -> str:
    """The page of Emoji World, its model card."""
    return (ROOT / CARD).read_text(encoding="utf-8").replace("](../../docs/", "](")


def command_line() -> str:
    """The page of the command line, from the parsers."""
    from respodiff_jax import cli

    parser = cli._parser()
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = ["# Command line\n", parser.description, _block(parser.format_usage())]
    for name, verb in verbs.choices.items():
        parts += [f"## respodiff {name}\n", verb.description or "", _block(verb.format_usage())]
        for group in verb._action_groups:
            rows = [_row(verb, action) for action in group._group_actions]
            rows = [row for row in rows if row]
            if rows:
                parts += [f"**{group.title}**\n", "| | |\n|---|---|\n" + "\n".join(rows) + "\n"]
        if verb.epilog:
            parts.append(_block(verb.epilog))
    return "\n".join(parts)


def _row(parser, action) -> str | None:
    if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
        return None
    names = ", ".join(action.option_strings) or action.metavar or action.dest
    formatter = parser._get_formatter()
    text = formatter._expand_help(action) if action.help else ""
    value = ""
    if action.option_strings and action.nargs != 0:
        value = " " + formatter._format_args(
            action, formatter._get_default_metavar_for_optional(action)
        )
    return f"| `{names}{value}` | {_escaped(text)} |"


def _escaped(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("*", "\\*")
    return text.replace("|", "&#124;").replace("_", "\\_")


def _block(text: str) -> str:
    return f"\n```text\n{text.strip(chr(10))}\n```\n"


def deviations() -> str:
    """The page of deliberate differences from the paper and the authors' code: the docstrings'."""
    parts = [
        "# Deviations from the paper\n",
        "What this package does otherwise than the paper or the authors' code, with the reason, as"
        " the docstrings say it.\n",
    ]
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node) or ""
            for found in re.findall(r"Deviation: (.+?)(?=\n\n|\Z)", text, re.DOTALL):
                name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                parts.append(f"**`{name}`** {_escaped_text(' '.join(found.split()))}\n")
    return "\n".join(parts)


def _escaped_text(text: str) -> str:
    return text.replace("<", "&lt;")
