"""Pages of the API, read from the source: no module is imported, so nothing heavy is installed.

Docstrings are plain text with Google's sections (Args, Returns, Raises); what is indented elsewhere
is an equation or a piece of code.
"""

import ast
import inspect
import re
from pathlib import Path

SECTION = re.compile(r"(Args|Returns|Yields|Raises):\s*(.*)")
ENTRY = re.compile(r"([\w, *]+): (.*)")
MARKUP = re.compile(r"[*_$<\[\]|~#]")
CODE = re.compile(r"(`[^`]+`)")


def page(module: Path) -> str:
    """Return the page of a module: its docstring, then its public classes and functions."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    parts = [f"# {module.stem}", f"`beyond_dpo.{module.stem}`"]
    parts.append(f"```{{py:module}} beyond_dpo.{module.stem}\n```")
    parts.append(markdown(ast.get_docstring(tree) or ""))
    for node in tree.body:
        if is_public(node):
            parts.append(entry(node))
    return "\n\n".join(parts) + "\n"


def is_public(node: ast.stmt) -> bool:
    """Return whether a statement defines a class or function that others may use."""
    defines = isinstance(node, ast.FunctionDef | ast.ClassDef)
    return defines and not node.name.startswith("_")


def entry(node: ast.FunctionDef | ast.ClassDef, kind: str = "function", fence: str = "::::") -> str:
    """Return a definition as a directive of Sphinx's domain of Python.

    Args:
        kind: "function" or "method", of a function.
        fence: of the directive; a method's is shorter than that of its class.
    """
    body = [markdown(ast.get_docstring(node) or "")]
    if isinstance(node, ast.ClassDef):
        kind = "class"
        signature = node.name
        body += [f"- `{field}`" for field in fields(node)]
        for method in node.body:
            if is_public(method):
                body += ["", entry(method, "method", fence[1:])]
    else:
        signature = f"{node.name}({ast.unparse(node.args)})"
        if node.returns is not None:
            signature += f" -> {ast.unparse(node.returns)}"
    content = "\n".join(body)
    return f"{fence}{{py:{kind}}} {signature}\n\n{content}\n{fence}"


def fields(node: ast.ClassDef) -> list[str]:
    """Return the annotated fields of a class, as its source has them."""
    annotated = [one for one in node.body if isinstance(one, ast.AnnAssign)]
    return [ast.unparse(one) for one in annotated if not one.target.id.startswith("_")]


def markdown(docstring: str) -> str:
    """Return a docstring as Markdown."""
    blocks = []
    for heading, lines in sections(inspect.cleandoc(docstring).splitlines()):
        if heading:
            blocks.append(f"**{heading}**\n\n{listed(lines)}")
        else:
            blocks.append(prose(lines))
    return "\n\n".join(block for block in blocks if block) + "\n"


def sections(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Return (heading, lines) of each section, "" for what stands between them."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        start = SECTION.match(line)
        if start:
            heading, rest = start.groups()
            found.append((heading, [rest] if rest else []))
        elif found[-1][0] and line and not line.startswith(" "):
            found.append(("", [line]))
        else:
            found[-1][1].append(line)
    return found


def listed(lines: list[str]) -> str:
    """Return the entries of a section, an item each; a longer indent continues one."""
    text = inspect.cleandoc("\n" + "\n".join(lines))
    items: list[str] = []
    for line in text.splitlines():
        begins = ENTRY.fullmatch(line)
        if begins:
            name, rest = begins.groups()
            items.append(f"`{name}`: {plain(rest)}")
        elif items and line.strip():
            items[-1] += f" {plain(line.strip())}"
        elif line.strip():
            items.append(plain(line.strip()))
    return "\n".join(f"- {item}" for item in items)


def prose(lines: list[str]) -> str:
    """Return paragraphs as they are, and what is indented as it stands."""
    out: list[str] = []
    inside = False
    for line in lines:
        indented = line.startswith("    ")
        if line.strip() and indented != inside:
            while out and not out[-1].strip():
                out.pop()
            out += ["", "```text"] if indented else ["```", ""]
            inside = indented
        out.append(line.removeprefix("    ") if inside else plain(line))
    text = "\n".join(out).strip()
    return f"{text}\n```" if inside else text


def plain(line: str) -> str:
    """Return a line whose marks mean themselves, but for `code`."""
    parts = CODE.split(line)
    for place in range(0, len(parts), 2):
        parts[place] = MARKUP.sub(r"\\\g<0>", parts[place])
    return "".join(parts)
