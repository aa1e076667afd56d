"Odd arguments and damaged files: a sample of what `make crash` tries, what once failed, and what the judge sees."
import pytest
from hypothesis import given, settings
import fuzz
from child import Done

FAILED = [ # cases that once ended badly
]

@pytest.fixture(scope="module", autouse=True)
def materials(): fuzz.materials()

@settings(max_examples=50, derandomize=True, **fuzz.FIXED)
@given(fuzz.cases())
def test_a_sample_ends_well(case): assert fuzz.wrong(case) == []

@pytest.mark.parametrize("case", FAILED, ids=ascii)
def test_what_once_failed_ends_well(case): assert fuzz.wrong(case) == []

def test_every_command_is_fuzzed_from_one_that_works():
    assert {*fuzz.commands()} == {*fuzz.BASE, "doctor"}

@pytest.mark.parametrize("done, word", [
    (Done(1, "", "Traceback (most recent call last):\n  File ..\nKeyError: 3", 1), "Traceback"),
    (Done(1, "", "one\ntwo\nthree", 1), "3 lines"), (Done(1, "", "", 1), "0 lines"),
    (Done(1, "", "ultra-nb: KeyError: 3", 1), "no message"), (Done(1, "", "ultra-nb: 'x'", 1), "no message"),
    (Done(2, "", "x" * 2000, 1), "2000 characters"), (Done(1, "", "ultra-nb: no file \x1b[31m", 1), "control"),
    (Done(-11, "", "", 1), "exit code"), (Done(-14, "", "Backbone(..)", 1), "not a word"),
    (Done(0, "IoU 3.2 (nan to 5.1)", "", 1), "a number that is none"),
])
def test_the_judge_sees_a_bad_end(done, word, tmp_path):
    assert word in fuzz.judged(done, ("segment",), [], tmp_path)[0]

BAD = {"a.png": b"\x89PNG", "a.json": b"NaN", "a.jsonl": b"1\n{", "a.pdf": b""}

@pytest.mark.parametrize("name", BAD)
def test_the_judge_sees_a_bad_file(name, tmp_path):
    (tmp_path / name).write_bytes(BAD[name])
    done, failed = Done(0, "", "", 1), Done(1, "", "ultra-nb: it is full", 1)
    assert fuzz.judged(done, ("segment",), [name], tmp_path)
    assert fuzz.judged(failed, ("segment",), [name], tmp_path) == [f"left or changed: {name}"]
