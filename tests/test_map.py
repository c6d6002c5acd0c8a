"""The page of the map says what its runs say."""

from pathlib import Path

from bench.method_map_page import equal_rates, mechanisms, pooled, real, tables, updates, variant

PAGE = Path(__file__).parents[1] / "docs/evidence/map.md"


def test_every_table_of_the_page_is_made_of_the_runs():
    page, made = PAGE.read_text(), tables()
    assert "near" in made and "filter" in made
    made |= {table.__name__: table() for table in (pooled, equal_rates, mechanisms, real, updates, variant)}
    for name, lines in made.items():
        assert "\n".join(lines) in page, f"the page lacks the table {name}: python -m bench.method_map_page"
