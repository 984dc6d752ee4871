"""The commands of README, CONTRIBUTING and docs can be run: scripts exist and take the flags, links lead
on."""

import ast
import dataclasses
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.energon.tools.prepare import command as energon_prepare

from megatron_vlm.config.flags import flag_name
from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections import SECTIONS
from megatron_vlm.launch.container import RUNTIMES
from megatron_vlm.plan.rules import validate

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/compat/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
RUN = "scripts/train/run.py"
# Of programs that a test machine need not have.
FLAGS_OF_OTHERS = {
    "apptainer": {"--nv", "--fakeroot", "--disable-cache", "--build-arg", "--sandbox"}
    | {"--cleanenv", "--containall"},
    "srun": {"--ntasks-per-node", "--cpus-per-task"},
    "sbatch": {"--gpus-per-node"},
    "scancel": {"--signal"},
    "pip": {"--extra-index-url"},
}


def commands(page: Path) -> list[list[str]]:
    """The commands in a page's shell blocks, as words; ``<placeholders>`` become one word."""
    found = []
    for block in re.findall(r"```shell\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"<[^<>]*>", "placeholder", line), comments=True)
            if words:
                found.append(words)
    return found


@functools.cache
def flags_of(*script: str) -> set[str]:
    """The flags in the ``--help`` of a script, or of a module: ``"-m"`` and its name."""
    shown = subprocess.run([sys.executable, *script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", shown.stdout))


def energon_flags() -> set[str]:
    return {name for option in energon_prepare.params for name in (*option.opts, *option.secondary_opts)}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check(words: list[str]) -> None:
    """Check one command; a program that is not known here fails."""
    program, *rest = words
    given = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    if program in RUNTIMES and rest[0] == "exec":
        check(rest[2:])
    elif program in RUNTIMES and rest[0] == "build":
        assert (ROOT / rest[-1]).is_file()
        assert given <= FLAGS_OF_OTHERS["apptainer"]
    elif program == "srun":
        at = rest.index("python")
        assert {word for word in rest[:at] if word.startswith("-")} <= FLAGS_OF_OTHERS["srun"]
        check(rest[at:])
    elif program == "make":
        assert rest[0] in make_targets()
    elif program == "energon" and rest[0] == "prepare":
        assert given <= energon_flags()
    elif program == "python" and rest == [RUN, "--help"]:
        assert flags_of(RUN)
    elif program == "python" and rest[0] == RUN:
        RunConfig.from_flags(rest[1:])  # values as well as names
    elif program == "python" and rest[0] == "-m":
        assert given - {"-m"} <= flags_of(*rest[:2])
    elif program == "python":
        assert given <= flags_of(rest[0])
    else:
        pytest.fail(f"nothing here knows {program}")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=f"{page.stem}-{words[0]}-{i}")
        for page in PAGES
        for i, words in enumerate(commands(page))
    ],
)
def test_command(words: list[str]) -> None:
    check(words)


def test_the_readme_shows_the_whole_pipeline() -> None:
    shown = {word for words in commands(ROOT / "README.md") for word in words}
    assert {
        "demo",
        "test",
        "environments/recipe_latest.def",
        "scripts/data/prepare.py",
        "scripts/data/preview.py",
        RUN,
    } <= shown
    assert {"scripts/inference/generate.py"} <= shown
    assert {f"scripts/convert/{path.name}" for path in (ROOT / "scripts/convert").glob("*.py")} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_in_the_text_exist(page: Path) -> None:
    known = set().union(energon_flags(), flags_of(RUN), *FLAGS_OF_OTHERS.values())
    for script in [
        *(ROOT / "scripts/convert").glob("*.py"),
        ROOT / "scripts/inference/generate.py",
        *(ROOT / "scripts/data").glob("*.py"),
        ROOT / "scripts/train/status.py",
    ]:
        known |= flags_of(str(script.relative_to(ROOT)))
    known |= flags_of("-m", "benchmarks.memory") | flags_of("-m", "benchmarks.gpu_check")
    known |= flags_of("-m", "benchmarks.same_numbers")
    known |= {flag.replace("--", "--no-", 1) for flag in flags_of(RUN)}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", page.read_text()))
    assert mentioned <= known


def flag_row_start(field: dataclasses.Field) -> str:
    """The beginning of a flag's row in docs/flags.md: its spellings and its default."""
    about, default = field.metadata, field.metadata["shown_default"]
    names = [flag_name(name) for name in (about["choices"] if about["switches"] else [field.name])]
    spellings = ", ".join(f"`{name}`" for name in [*names, about["short"]] if name)
    if default is None:
        default = {"True": "on", "False": "off", "None": "-", "()": "-"}.get(
            str(field.default), field.default
        )
    return f"| {spellings} | {default} |"


def test_the_page_of_flags_has_every_flag_with_its_default() -> None:
    page = (ROOT / "docs/flags.md").read_text()
    found = {}  # row: heading that it stands under
    for part in page.split("\n## ")[1:]:
        heading, *lines = part.splitlines()
        found.update({line: heading for line in lines if line.startswith("| `-")})
    expected = {}
    for field in [field for section in SECTIONS.values() for field in dataclasses.fields(section)]:
        group, start = field.metadata["group"], flag_row_start(field)
        rows = [row for row, heading in found.items() if row.startswith(start) and heading == group]
        line = f"{start} {field.metadata['help']} | how the original run.py differs, or nothing |"
        assert len(rows) == 1, f"docs/flags.md: under '## {group}' there has to be one line like\n{line}"
        expected[rows[0]] = group
        assert ("Not available yet" in rows[0]) == bool(field.metadata["not_yet"]), rows[0]
    assert found == expected, "docs/flags.md: these rows are of no flag, or of one with another default"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_begins_with_commands(page: Path) -> None:
    """What most readers came for stands in the first twelve lines."""
    begin = page.read_text().splitlines()[:12]
    assert "```shell" in begin or page.stem == "cuda-not-yet-run"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_leads_to_every_page() -> None:
    """By itself, or by a page that it leads to."""
    found: set[Path] = set()
    queue = [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        targets = re.findall(r"\]\(([^)#]+\.md)[^)]*\)", page.read_text())
        new = {(page.parent / target).resolve() for target in targets} - found
        found |= new
        queue += new
    assert {page.resolve() for page in PAGES} - {ROOT.resolve() / "README.md"} <= found


def test_the_map_names_every_folder() -> None:
    """Each line is a folder, below the one that is further left; none of the package is left out."""
    map_of_code = (ROOT / "README.md").read_text().split("\n## A map of the code\n")[1].split("\nImports")[0]
    shown: list[Path] = []
    above: dict[int, Path] = {2: ROOT}
    for indent, name in re.findall(r"^( {4,10})([\w.]+)/ ", map_of_code, re.MULTILINE):
        above[len(indent)] = above[len(indent) - 2] / name
        shown.append(above[len(indent)])
    packages = {path.parent for path in (ROOT / "megatron_vlm").rglob("__init__.py")}
    commands = {path.parent for path in (ROOT / "scripts").rglob("*.py")}
    assert all(folder.is_dir() for folder in shown) and len(shown) == len(set(shown))
    assert packages | commands | {ROOT / name for name in ("docs", "tests", "examples")} <= set(shown)


PACKAGES = sorted((ROOT / "megatron_vlm").rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.parent.name)
def test_a_package_that_lists_its_files_lists_all(package: Path) -> None:
    text = ast.get_docstring(ast.parse(package.read_text())) or ""
    named = set(re.findall(r"(?<![\w/])\w+\.py\b", text))
    own = {path.name for path in package.parent.glob("*.py")} - {"__init__.py"}
    others = {path.name for folder in (package.parent, ROOT / "scripts") for path in folder.rglob("*.py")}
    assert named <= others
    assert own <= named or not own & named, own - named


def test_docstrings_name_their_subject() -> None:
    """A first line that begins with a pronoun or a question word reads as a riddle."""
    riddles = re.compile(r"(What|Whether|Which|Where|Why|How|Its?|Those|That|As|Of|Also|The same|None)\b")
    found = []
    for folder in ("megatron_vlm", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node) or ""
                    found += [f"{path.relative_to(ROOT)}: {text[:80]}"] if riddles.match(text) else []
    assert not found, "\n".join(found)


def test_the_demo_runs_what_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples/digits")
    import demo

    ran: list[list[str]] = []

    def record(command: list[str], **_: object) -> SimpleNamespace:
        ran.append(list(command))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo.subprocess, "run", record)
    monkeypatch.setattr(demo.shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--tp", "2", "--pp", "2"])
    demo.main()
    scripts = [words for words in ran if words[1].startswith("scripts/") or words[0] == "energon"]
    assert len(scripts) == 5
    for words in scripts:
        check(words)
    assert all((ROOT / words[1]).is_file() for words in ran if words[0] == "python")
    (train,) = (words for words in ran if words[1] == RUN)
    validate(RunConfig.from_flags(train[2:]), world_size=4)
