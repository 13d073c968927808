"""docs/errors.md: every message of the sources is on it, is provoked here, and has the text that the page shows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from building import SOURCE
from messages import PAGE, SECTIONS, Message, page
from this_run import why_no_cuda

MESSAGES = [message for messages, _ in SECTIONS.values() for message in messages]


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_the_message_is_what_is_said(message: Message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cuda" in message.call and (reason := why_no_cuda()):
        pytest.skip(reason)
    said = " ".join(message.provoke(tmp_path, monkeypatch).split())
    pattern = ".+?".join(map(re.escape, message.text.split("…")))
    assert re.fullmatch(pattern, said) if message.call else re.search(pattern, said), said


def test_the_page_is_what_the_list_gives() -> None:
    assert PAGE.read_text() == page(), "run python tests/support/messages.py"


# What the sources say, each as a regular expression with .+ for what they fill in.

HOLE = "\0"
LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')


def of_python(file: Path) -> Iterator[str]:
    """What is raised, exited with, refused by a parser or warned of; also where a function of the file words it."""
    tree = ast.parse(file.read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    def words(node: ast.expr, known: dict[str, ast.expr]) -> Iterator[str]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            function = functions[node.func.id]
            arguments = dict(zip([argument.arg for argument in function.args.args], node.args))
            for inner in ast.walk(function):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from words(inner.value, arguments)
        elif isinstance(node, ast.Call) and node.args:
            yield from words(node.args[0], known)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(filled(part, known) for part in node.values)

    def filled(part: ast.expr, known: dict[str, ast.expr]) -> str:
        if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
            part = known.get(part.value.id, part)
        return str(part.value) if isinstance(part, ast.Constant) else HOLE

    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from words(node.exc, {})
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "parser.error", "warnings.warn"):
            for argument in node.args[:1]:
                yield from words(argument, {})


def arguments_of(text: str, start: int) -> list[str]:
    """The arguments of a macro or function of C++, from behind its parenthesis."""
    depth, arguments = 1, [""]
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|.', text[start:], re.DOTALL):
        depth += (token in "([{") - (token in ")]}")
        if depth == 0:
            break
        if token == "," and depth == 1:
            arguments.append("")
        else:
            arguments[-1] += token
    return arguments


def of_cpp(file: Path) -> Iterator[str]:
    """What checks and warnings say; the first argument is the condition or the kind."""
    text = file.read_text()
    for found in re.finditer(r"\b(?:TORCH_(?:CHECK|WARN)\w*|PyErr_(?:SetString|Format|WarnEx))\(", text):
        said = arguments_of(text, found.end())[1:]
        yield "".join("".join(LITERAL.findall(part)) if part.strip().startswith('"') else HOLE for part in said).replace(
            "\\", ""
        )


def of_cmake(file: Path) -> Iterator[str]:
    for found in re.findall(r"message\(\s*(?:\w*ERROR|WARNING|\$\{\w+\})((?:\s*\"(?:[^\"\\]|\\.)*\")+)", file.read_text()):
        yield re.sub(r"\$(ENV)?\{\w+\}", HOLE, "".join(LITERAL.findall(found))).replace("\\n", "\n")


READERS = {".py": of_python, ".cpp": of_cpp, ".h": of_cpp, ".cu": of_cpp, ".cuh": of_cpp, ".cmake": of_cmake, ".txt": of_cmake}
FOLDERS = ("kl_ext", "csrc", "cmake", "build_backend")


def said_by_the_sources() -> Iterator[tuple[Path, str]]:
    files = [SOURCE / "setup.py", SOURCE / "CMakeLists.txt", *(file for name in FOLDERS for file in (SOURCE / name).rglob("*"))]
    for file in files:
        if file.suffix in READERS and "sass" not in file.parts and "include" not in file.parts:
            for text in READERS[file.suffix](file):
                if text.strip(HOLE + " :\n"):
                    yield file.relative_to(SOURCE), " ".join(text.split())


def test_every_message_of_the_sources_is_provoked() -> None:
    sources = list(said_by_the_sources())
    assert {file.suffix for file, _ in sources} >= {".py", ".cpp", ".h", ".cmake", ".txt"} and len(sources) > 80
    missing = []
    for file, text in sources:
        pattern = ".+".join(map(re.escape, text.split(HOLE)))
        if not any(re.search(pattern, message.text) for message in MESSAGES):
            missing.append(f"{file}: {text.replace(HOLE, '…')}")
    assert not missing, "\n".join(["no case of tests/support/messages.py has these:", *missing])
