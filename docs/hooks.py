"""What mkdocs asks while it builds: generated parts, and files that stand outside of `docs/`.

A page holds `<!-- generated: NAME -->` where a part is made from the code (`PARTS`). Pages link to
any file of the repository by its relative path, as on a git host; at build the file becomes a
part of the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from mm_piece.cli import main
from mm_piece.importance.rules import RULES
from mm_piece.recipe.schema import GeneralTask, Recipe, Task
from mm_piece.recipe.select import SelectionSettings, StrictModel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
MEANINGS = ROOT / "docs" / "reference" / "recipe-keys.yaml"
# Documents that stand elsewhere in the repository, and their place on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "dev/changelog.md",
    "CONTRIBUTING.md": "dev/contributing.md",
    "checkpoints/README.md": "reference/delta-format.md",
    "checkpoints/tiny/base/README.md": "results/tiny-base.md",
    "eval/LOG.md": "dev/log.md",
    "examples/README.md": "examples.md",
    "pipelines/README.md": "guide/recipes.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)#])")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents that stand elsewhere, and every other file that a page links to."""
    from mkdocs.structure.files import File

    linked = {link for source in list_documents() for link in find_links(source)}
    for path in sorted(linked | set(ELSEWHERE)):
        place = find_place(path)
        if files.get_file_from_path(place) is None:
            file = File.generated(config, place, abs_src_path=str(ROOT / path))
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the generated parts, lead links to their place on the site, drop marks of tables."""
    place = page.file.src_uri
    source = find_source(place)
    markdown = fill_parts(markdown)
    markdown = re.sub(r"^<!--.*-->$", "", markdown, flags=re.M)

    def lead(match: re.Match[str]) -> str:
        path = resolve(source, match[1])
        return posixpath.relpath(find_place(path), posixpath.dirname(place))

    parts = CODE.split(markdown)
    for number in range(0, len(parts), 2):  # code stands between
        parts[number] = LINK.sub(lead, parts[number])
    return "".join(parts)


def list_documents() -> list[str]:
    """Return all documents of the site, as paths from the repository's root."""
    pages = (ROOT / "docs").rglob("*.md")
    return [*(page.relative_to(ROOT).as_posix() for page in pages), *ELSEWHERE]


def find_links(source: str) -> Iterator[str]:
    """Yield the files that a document links to, as paths from the repository's root."""
    text = CODE.sub("", (ROOT / source).read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        yield resolve(source, link)


def resolve(source: str, link: str) -> str:
    """Return the path, from the repository's root, that a link of a document means."""
    folder = posixpath.dirname(source)
    return posixpath.normpath(posixpath.join(folder, link))


def find_place(path: str) -> str:
    """Return the place on the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return ELSEWHERE.get(path, f"files/{path}")


def find_source(place: str) -> str:
    """Return the document, as a path from the repository's root, of a place on the site."""
    for path, known in ELSEWHERE.items():
        if known == place:
            return path
    return f"docs/{place}"


def fill_parts(markdown: str) -> str:
    """Return a page with each `<!-- generated: NAME -->` followed by what it stands for."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[0]}\n\n{PARTS[match[1]]()}\n"

    return re.sub(r"^<!-- generated: ([\w-]+) -->$", fill, markdown, flags=re.M)


def list_commands() -> str:
    """Return a section for every command: what `--help` prints of it."""
    settings = {**main.context_settings, "terminal_width": 88}
    context = click.Context(main, info_name="mm-piece", **settings)
    sections = [f"```text\n{main.get_help(context)}\n```"]
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        inner = click.Context(command, parent=context, info_name=name)
        sections.append(f"## {name}\n\n```text\n{command.get_help(inner)}\n```")
    return "\n\n".join(sections)


def list_keys(model: type[StrictModel], besides: type[StrictModel] | None = None) -> str:
    """Return a table of the keys of a part of a recipe, without those of another part."""
    meanings = yaml.safe_load(MEANINGS.read_text(encoding="utf-8"))[model.__name__]
    schema = model.model_json_schema()
    known = besides.model_fields if besides else {}
    keys = [key for key in schema["properties"] if key not in known]
    if set(keys) != set(meanings):
        differing = ", ".join(sorted(set(keys) ^ set(meanings)))
        raise ValueError(f"{MEANINGS}: not as the schema has it: {model.__name__}: {differing}")

    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        content = schema["properties"][key]
        cells = (f"`{key}`", describe_value(content), describe_default(content), meanings[key])
        lines.append("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def describe_value(content: dict[str, Any]) -> str:
    """Return in words what a value may be."""
    if "anyOf" in content:
        options = [option for option in content["anyOf"] if option.get("type") != "null"]
        return ", or ".join(map(describe_value, options))
    if "enum" in content:
        return ", ".join(f"`{option}`" for option in content["enum"])
    if "$ref" in content:
        return "a mapping, see below"

    kind = content.get("type")
    if kind == "array":
        return "a list, each " + describe_value(content["items"])
    words = {"string": "text", "integer": "whole number", "object": "a mapping"}
    return words.get(str(kind), str(kind)) + describe_bounds(content)


def describe_bounds(content: dict[str, Any]) -> str:
    """Return the limits of a number, in brackets, or nothing."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    # a limit such as 2**31 has more digits than `:g` shows
    bounds = [
        f"{sign} {content[key]:,g}" if content[key] < 1e6 else f"{sign} {content[key]:,}"
        for key, sign in signs.items()
        if key in content
    ]
    return f" ({', '.join(bounds)})" if bounds else ""


def describe_default(content: dict[str, Any]) -> str:
    """Return the default of a key, as YAML."""
    if "default" not in content:
        return "required"
    default = content["default"]
    if default in (None, [], {}) or isinstance(default, dict):
        return "none"
    return f"`{yaml.safe_dump(default, default_flow_style=True).splitlines()[0]}`"


def list_rules() -> str:
    """Return a table of the importance rules: what they sum up, and defaults of their own."""
    lines = ["| method | sums up | defaults in `select` |", "|---|---|---|"]
    for name, rule in RULES.items():
        sums = ", ".join(rule.needs) or "nothing: it reads no data"
        defaults = ", ".join(f"`{key}: {value}`" for key, value in rule.defaults.items())
        lines.append(f"| `{name}` | {sums} | {defaults or 'as above'} |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "commands": list_commands,
    "recipe-keys": lambda: list_keys(Recipe),
    "task-keys": lambda: list_keys(Task, besides=GeneralTask),
    "general-keys": lambda: list_keys(GeneralTask),
    "select-keys": lambda: list_keys(SelectionSettings),
    "rules": list_rules,
}
