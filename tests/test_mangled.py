"""A hundred mangled files of every sort, each given to one operation; all of them, and more, in slow/mangled.py."""

from tests.mangling import try_all


def test_what_is_mangled_is_used_or_named(tmp_path):
    trial = try_all(tmp_path, count=100, seed=1, every_operation=False)
    assert trial.cases >= 100
    assert not trial.problems, "\n".join(trial.problems)
