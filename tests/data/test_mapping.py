"""Rows that `datasets` caches are used again only by the code that made them."""

import pytest
from datasets import Dataset

from trl_miso.data import mapping
from trl_miso.data.mapping import map_rows, package_digest
from trl_miso.recipe import RecipeArguments, adapt_rows

CALLS = []


def doubled(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
    CALLS.append(indices)
    return {"a": [2 * value for value in batch["a"]]}


def mapped(rows: Dataset) -> Dataset:
    return map_rows(rows, doubled, None, "Doubling")


def adapted(rows: Dataset) -> Dataset:
    return adapt_rows(rows, RecipeArguments(dataset_name="x", source="alpaca"))


@pytest.mark.parametrize("function", [mapped, adapted])
def test_another_version_of_the_package_maps_anew(function, tmp_path, monkeypatch):
    rows = Dataset.from_dict(
        {"a": [1, 2], "instruction": ["Hi.", "Ho."], "input": ["", ""], "output": ["One.", "Two."]}
    )
    if function is adapted:
        rows = rows.remove_columns("a")
    rows.save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(str(tmp_path / "rows"))
    first, again = function(rows), function(rows)
    assert [file["filename"] for file in first.cache_files] == [file["filename"] for file in again.cache_files]
    calls = len(CALLS)
    monkeypatch.setattr(mapping, "package_digest", lambda: "another version")
    other = function(rows)
    assert [file["filename"] for file in other.cache_files] != [file["filename"] for file in first.cache_files]
    assert other[:] == first[:] and len(CALLS) == calls + (function is mapped)
    assert len(package_digest()) == 64
