"""Where the tests find files of the project."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
PROJECT = TESTS.parent
HELPERS = TESTS / "helpers"
GOLDEN = TESTS / "golden"  # figures of the official code
FIXTURES = TESTS / "fixtures"  # figures of other libraries, and what made them
