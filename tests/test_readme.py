"""The README is a front page: short, and every link into the repository leads to a file that exists."""

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def readme():
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_it_is_a_page_long(readme):
    assert len(readme.splitlines()) <= 150


def test_links_are_absolute_and_lead_to_files(readme):
    """As PyPI needs them: it shows the README without the files beside it."""
    urls = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    owner_and_name = urls["Repository"].removeprefix("https://github.com/")
    prefixes = (
        f"https://github.com/{owner_and_name}/blob/main/",
        f"https://raw.githubusercontent.com/{owner_and_name}/main/",
    )
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", readme)
    targets = [markdown or html for markdown, html in links]
    assert len(targets) > 20
    for target in targets:
        assert target.startswith(("https://", "#")), f"{target} is not absolute"
        for prefix in prefixes:
            if target.startswith(prefix):
                assert (REPOSITORY / target.removeprefix(prefix)).exists(), f"{target} leads nowhere"
