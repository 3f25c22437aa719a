"""The pages beside the examples: links, commands, and that no error is left out."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from lightning_efficient_init import errors
from lightning_efficient_init.bench.ways import GROUPS, WAYS
from lightning_efficient_init.cli.main import parser
from lightning_efficient_init.memory_plan import STRATEGIES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]
COMMANDS = [
    line.split(" # ")[0].strip()
    for page in PAGES
    for line in page.read_text().splitlines()
    if re.match(r"\s*efficient-init (inspect|plan|bench)\b", line)
]


def test_pages_and_commands_are_found():
    assert len(PAGES) == 6
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    options = parser().parse_args(shlex.split(command)[1:])
    for way in getattr(options, "ways", []):
        assert way in {**GROUPS, **WAYS}


def test_every_exception_is_explained():
    page = (ROOT / "examples" / "errors.md").read_text()
    for name, cls in vars(errors).items():
        if inspect.isclass(cls) and issubclass(cls, Exception):
            assert f"`{name}`" in page, name


def test_strategies_that_are_recommended_exist():
    page = (ROOT / "examples" / "strategies.md").read_text()
    assert set(re.findall(r"`(efficient_init\w*)`", page)) <= set(STRATEGIES)
