"""`make mutate` runs for a quarter of an hour; that its list is up to date shows at once."""

from mutate import MUTANTS, ROOT, SUITES


def test_no_mutant_is_stale():
    stale = [m for m in MUTANTS if (ROOT / m.file).read_text().count(m.old) != 1]
    assert not [f"{m.file}: {m.why}" for m in stale]


def test_suites_name_tests_that_exist():
    there = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("*/test_*.py")}
    assert not [name for files, _ in SUITES.values() for name in files.split() if name not in there]
