"Odd arguments and damaged files: a sample of what `make crash` tries, what once failed, and what the judge sees."
import shutil
from multiprocessing.reduction import ForkingPickler
import pytest
import torch
from hypothesis import given, settings
import fuzz
from child import Done

RESUMED = tuple(f"{fuzz.EVALUATE} --out out".split())
TRAIN = tuple("train settings.json --out out".split())
FIT, SUMMARIZE = tuple(fuzz.FIT.split()), tuple(f"{fuzz.SUMMARIZE} --model model".split())
SEGMENT = tuple("segment --model vit --layer 2 --clusters 2".split())
CHECKPOINT = "W.safetensors.run/checkpoint.safetensors"
FAILED = [ # cases that once ended badly
    ("everything", tuple("bench maps --layer 2 --image-size 64".split())),
    ("everything", (*TRAIN, "--model", "or")),
    ("everything", (*TRAIN, "--data", "new.json", "--model", "")),
    ("everything", (*TRAIN, "\x16", "--data", "\x16")),
    ("everything", ("data", "folder", "--root", "\x89")),
    ("everything", ("segment", "", "\x9a", "2", "--clusters", "2")),
    ("everything", ("summarize", "text", "--summary", "Sell", "--html", "\x94")),
    ("everything", ("bench", "maps", "--repeats", "1", "--layer", "2", "--image-size", "64", "--weights", "\x18")),
    ("everything", tuple("evaluate folder --root own --layer 2 --limit 2 --ignore 999".split())),
    ("voc", ("data", "voc", "--root", "."), "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", ("flip", [(53, 1)])),
    ("coco_stuff", tuple("data coco-stuff --root .".split()), fuzz.STUFF[1], ("other", "zip")),
    ("tiles", tuple("itiou potsdam --root . --split all --layer 2".split()), fuzz.TILES[0], ("cut", 31)),
    ("potsdam", tuple("data potsdam --root .".split()), "labelled_test.txt", ("other", "nested")),
    ("weights", SEGMENT, "vit/preprocessor_config.json", ("json", [10, 7], 16)),
    ("weights", SEGMENT, "vit/preprocessor_config.json", ("json", [10, 24], 16)),
    ("weights", SEGMENT, "vit/preprocessor_config.json", ("json", [1], -1)),
    ("language", TRAIN, "settings.json", ("json", [12], 1)),
    ("language", TRAIN, "settings.json", ("json", [9], 9)),
    ("language", TRAIN, "settings.json", ("json", [23, 43], 1)),
    ("language", TRAIN, "settings.json", ("flip", [(-86, 5), (.5429178037396605, 3), (.5429178037396605, 3)])),
    ("language", TRAIN, "pairs.jsonl", ("cut", -69)),
    ("language", (*TRAIN, "--data", "pairs.csv"), "pairs.csv", ("cut", 20)),
    ("language", SUMMARIZE, "text", ("flip", [(-38, 5)])),
    ("language", SUMMARIZE, "model/tokenizer.json", ("json", [7, 7, 7, 7, 7], 7)),
    ("language", SUMMARIZE, "model/tokenizer.json", ("json", [25, 7, 7, 12, 32], 9)),
    ("language", SUMMARIZE, "model/tokenizer.json", ("flip", [(-22, 7), (.8366243383875202, 1), (-22, 7)])),
    ("language", SUMMARIZE, "model/tokenizer_config.json", ("json", [14, 31, 4, 20, 8], 17)),
    ("evaluated", RESUMED, "out/rows.jsonl", ("json", [0], 0)),
    ("evaluated", RESUMED, "out/rows.jsonl", ("json", [24, 31], 8)),
    ("half_evaluated", RESUMED, "out/part-0.jsonl", ("json", [0], 9)),
    ("half_evaluated", RESUMED, "out/part-0.jsonl", ("json", [17], 12)),
    ("half_evaluated", RESUMED, "out/part-0.jsonl", ("json", [17], 17)),
    ("half_evaluated", RESUMED, "out/part-0.jsonl", ("swap", -21, -28, 28)),
    ("half_evaluated", RESUMED, "out/part-0.jsonl", ("swap", -1, .4665903694608951, 1)),
    ("half_fitted", FIT, CHECKPOINT, ("cut", 57)),
    ("half_fitted", FIT, CHECKPOINT, ("cut", -99)),
    ("half_fitted", FIT, CHECKPOINT, ("other", "null")),
    ("half_fitted", FIT, CHECKPOINT, ("json", [0], 0)),
    ("reproduced", ("reproduce", "fig3"), "report/records/fig3.json", ("flip", [(.4736933325497337, 0)])),
]

@pytest.fixture(scope="module", autouse=True)
def materials():
    ForkingPickler.dumps(torch.zeros(1)) # as after work with other processes, which forks must not mix up with theirs
    yield fuzz.materials()
    shutil.rmtree(fuzz.materials())

@settings(max_examples=50, derandomize=True, **fuzz.FIXED)
@given(fuzz.cases())
def test_a_sample_ends_well(case): assert fuzz.wrong(case) == []

@pytest.mark.parametrize("case", FAILED, ids=ascii)
def test_what_once_failed_ends_well(case): assert fuzz.wrong(case) == []

def test_every_command_is_fuzzed_from_one_that_works():
    assert {*fuzz.commands()} == {*fuzz.BASE, "doctor"} | fuzz.SLOW

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
