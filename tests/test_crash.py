"Deaths at file operations and full disks: a sample of what `make crash` tries, and whether the harness sees anything."
from pathlib import Path
from random import Random
import crash

def test_a_sample_of_all_points():
    chosen = crash.points()
    assert len(chosen) >= 300
    assert [*crash.sweep(Random(0).sample(chosen, 24))] == []

def test_the_harness_sees_half_a_file(monkeypatch):
    "As a file is that is written in place"
    crash.loaded() # all that keeps `write_bytes`, before it is another
    monkeypatch.setattr("ultra_nb.records.write_bytes", lambda path, content: Path(path).write_bytes(content))
    monkeypatch.setattr(crash, "whole", crash.whole.__wrapped__)
    log = crash.whole("itiou").log
    at = next(i for i, (kind, where, _) in enumerate(log) if kind == "write" and where == "out/result.json")
    assert "half a file: out/result.json" in crash.trial(("itiou", at, "torn"))
