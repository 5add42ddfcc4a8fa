"""A hundred mangled files of every sort, each given to one operation; more, and to all of them, in slow/mangled.py."""

import json

import pytest

from tests.mangling import accounted, disagreements, misbehaviour, predicted, try_all
from tests.one_process import Outcome


def test_what_is_mangled_is_used_or_named(tmp_path):
    trial = try_all(tmp_path, count=100, seed=1, every_operation=False)
    assert trial.cases >= 100
    assert min(trial.used, trial.named, trial.refused) > 10, "it is all of one kind"
    assert not trial.problems, "\n".join(trial.problems)


def outcome(status, stderr="", stdout="", end=""):
    return Outcome(status, stdout, stderr, 1.0, 0, end=end)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (outcome(0), None),
        (outcome(2, "some remark\ntrain.py: a.pth: no weights\n"), None),
        (outcome(2, "a.pth\ntrain.py: no weights\n"), "does not name it"),
        (outcome(2, "train.py: no weights\na.pth\n"), "without a line that says why"),
        (outcome(1, "train.py: a.pth: no weights\n"), "exit status 1"),
        (outcome(None, "a.pth", end="takes more than 20 s"), "takes more than 20 s"),
        (outcome(0, "Traceback (most recent call last)\n"), "a traceback"),
        (outcome(0, stdout="set weights_only=False"), "as code"),
    ],
    ids=["fine", "refused", "not-named", "no-complaint", "status", "killed", "traceback", "advice"],
)
def test_misbehaviour_is_noticed(found, problem):
    problems = misbehaviour(found, {0, 2}, ["a.pth"])
    assert len(problems) == bool(problem)
    assert not problem or problem in problems[0]


@pytest.mark.parametrize(
    ("used", "bad", "problem"),
    [
        (["a"], {"b": "empty"}, None),
        (["a"], {}, "b was neither used nor named"),
        (["a", "b"], {"b": "empty"}, "b was named as bad, and used"),
        (["a", "a", "b"], {}, "a was used 2 times"),
        (["a"], {"b": "two\nlines"}, "b has no reason in one line"),
    ],
    ids=["fine", "lost", "both", "twice", "lines"],
)
def test_every_row_is_accounted_for(used, bad, problem):
    assert accounted(["a", "b"], used, bad)[1] == ([problem] if problem else [])


@pytest.mark.parametrize(
    ("status", "told", "said", "problem"),
    [
        (1, ["a"], "b: empty", None),
        (0, ["a", "b"], "b: seems cut off", None),
        (1, ["a"], "", "b was neither used nor named"),
        (0, ["a"], "b: empty", "exit status 0, with 1 of 2 files used"),
    ],
    ids=["fine", "warned", "lost", "status"],
)
def test_every_file_is_predicted_or_named(status, told, said, problem):
    stdout = "".join(json.dumps({"name": name}) + "\n" for name in told)
    assert predicted(outcome(status, said, stdout), ["a", "b"])[1] == ([problem] if problem else [])


def test_operations_agree_on_what_can_be_used():
    assert disagreements([{"a": None, "b": "empty"}, {"a": None, "b": "no file"}, {}]) == []
    assert disagreements([{"a": None}, {"a": "lasts more than 3 s"}]) == []
    assert disagreements([{"a": None}, {"a": "cut off"}]) == ["a is used, and refused: cut off"]
