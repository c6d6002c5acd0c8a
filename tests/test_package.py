"""What is in the wheel."""

from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_the_types_and_all_that_is_no_python():
    """Asked of the build backend itself: marker of the types, model, recipes, page templates, and no test."""
    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {"hapo/py.typed", "hapo/assets/demo.yaml", "hapo/assets/tiny/model.safetensors"} <= files
    tracked = {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/hapo").rglob("*") if path.is_file()
    }
    assert files == {path for path in tracked if "__pycache__" not in path}
