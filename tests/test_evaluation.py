"""Evaluation where a notebook cannot go: killed and resumed, several processes, a full disk, two runs at once, damaged
data."""
import json, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
import child
from ultra_nb.cli import main
from ultra_nb.datasets import scenes
from ultra_nb.evaluation import evaluate
from ultra_nb.models import load
from ultra_nb.records import Run

ROOT = Path(__file__).parent.parent
CLI = [sys.executable, "-m", "ultra_nb.cli", "evaluate"]
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
SMALL = ["--limit", "10", "--layer", "4", "--scalar", "sum", "--baselines"]

def run(*argv, **options): return subprocess.run([*map(str, argv)], capture_output=True, text=True, env=ENV, **options)

def results(out): return {name: (out / name).read_bytes() for name in ("rows.jsonl", "result.json")}

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An evaluation from start to end"
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run(*CLI, "scenes", *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    return out

def test_result_and_record(whole):
    record, result = (json.loads((whole / name).read_text()) for name in ("record.json", "result.json"))
    assert {"metrics", "n", "protocol", "seed", "settings", "command", "commit", "versions", "device", "seconds",
            "data_hash", "weights_hash"} <= set(record)
    assert record["n"] == result["n"] == 10 and record["protocol"] == "image-hungarian"
    assert record["metrics"]["U.mIoU"] == result["metrics"]["ULTra_S"]["U.mIoU"]
    assert {"one cluster", "latent tokens", "rollout", "LeGrad", "class maps"} <= set(result["metrics"])
    rows = [json.loads(line)["counts"] for line in (whole / "rows.jsonl").read_text().splitlines()]
    right, pixels = sum(np.max(r["one cluster"]) for r in rows), sum(np.sum(r["one cluster"]) for r in rows)
    assert result["metrics"]["one cluster"]["U.ACC"] == 100 * right / pixels
    for m in result["metrics"].values(): assert all(m[f"{k} low"] < m[k] < m[f"{k} high"] for k in ("U.mIoU", "U.ACC"))

def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(whole, tmp_path):
    out = tmp_path / "killed"
    part = out / "part-0.jsonl"
    for at_least in (1, 4): child.killed([*CLI, "scenes", *SMALL, "--out", out], part, at_least, ENV)
    with open(part, "ab") as f: f.write(b'{"i": 9, "name": "half a li')
    done = run(*CLI, "scenes", *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    assert results(out) == results(whole)

def test_two_processes_give_the_result_of_one(whole, tmp_path):
    out = tmp_path / "shared"
    argv = [sys.executable, *child.TWO_PROCESSES, *CLI[1:], "scenes", *SMALL, "--out", out]
    done = run(*argv, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(out) == results(whole)
    assert done.stdout.count("image-hungarian") == 1

def test_two_runs_do_not_share_a_folder(tmp_path):
    with Run(tmp_path / "out", dict(mine=1)):
        done = run(*CLI, "scenes", *SMALL, "--out", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "another run is writing" in done.stderr.splitlines()[-1]

def test_full_disk_keeps_what_is_there(whole, tmp_path):
    "A limit on file size stands in for the full disk"
    out = tmp_path / "full"
    line = " ".join(map(str, [*CLI, "scenes", *SMALL, "--out", out]))
    done = run("bash", "-c", f"ulimit -f 2; {line}")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "File too large" in done.stderr.splitlines()[-1]
    assert not (out / "rows.jsonl").exists()
    assert run(*CLI, "scenes", *SMALL, "--out", out).returncode == 0
    assert results(out) == results(whole)

@pytest.fixture
def own(tmp_path):
    "Five pictures of a user's own, of different sizes"
    for name in ("images", "masks"): (tmp_path / "own" / name).mkdir(parents=True)
    for i in range(5):
        sample = scenes("val", 5)[i]
        size = (112 + 16 * i, 112)
        sample.image.resize(size).save(tmp_path / f"own/images/{i}.png")
        Image.fromarray(sample.mask).resize(size, Image.Resampling.NEAREST).save(tmp_path / f"own/masks/{i}.png")
    return tmp_path / "own"

def test_damaged_image_is_named_and_nothing_else_lost(own, tmp_path):
    picture = own / "images/2.png"
    good, out = picture.read_bytes(), tmp_path / "out"
    picture.write_bytes(good[:500])
    argv = [*CLI, "folder", "--root", own, "--scalar", "sum", "--layer", 3, "--out", out]
    done = run(*argv)
    assert done.returncode == 1 and "1 of 5 images could not be read" in done.stderr and "2.png" in done.stderr
    assert "4 images of folder" in done.stdout
    assert run(*argv, "--skip-bad").returncode == 0
    picture.write_bytes(good)
    done = run(*argv)
    assert done.returncode == 0 and "5 images of folder" in done.stdout
    assert json.loads((out / "result.json").read_text())["bad"] == {}

@pytest.mark.parametrize("words, argv", {
    "tells where to get it": ("voc",),
    "no data set": ("imagenet",),
    "no folder": ("voc", "--root", "nowhere"),
    "choose image-hungarian": ("scenes", "--protocol", "best"),
    "choose 1 to 196": ("scenes", "--k", "197"),
    "choose one of sum": ("scenes", "--scalar", "mean"),
    "belongs to the data set 'folder'": ("scenes", "--ignore", "0"),
    "outside 2..": ("scenes", "--layer", "99"),
    "must be at least 1": ("scenes", "--limit", "0"),
    "ward linkage works": ("scenes", "--linkage", "ward"),
    "choose average": ("scenes", "--linkage", "centroid"),
    "there is no weights file": ("scenes", "--weights", "nothing.safetensors"),
    "needs a number of segments": ("scenes", "--threshold", ".4", "--baselines"),
    "segments cannot make": ("scenes", "--limit", "2", "--protocol", "dataset-hungarian", "--clusters", "99"),
}.items())
def test_wrong_arguments_are_one_line(words, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *argv]) == 1
    err = capsys.readouterr().err.strip()
    said = err.splitlines()[-1]
    assert said.startswith("ultra-nb: ") and words in said and "Traceback" not in err

def test_thresholds_that_give_one_cluster_or_every_token():
    backbone = load("scenes_clip")
    one = evaluate(backbone, scenes("val", 3), threshold=2., layer=3)
    every = evaluate(backbone, scenes("val", 3), "image-majority", threshold=0., layer=3)
    assert all(len(row["counts"]["ULTra_S"]) == 1 for row in one.rows)
    assert all(len(row["counts"]["ULTra_S"]) > 50 for row in every.rows)
    assert every.metrics["ULTra_S"]["U.ACC"] > one.metrics["ULTra_S"]["U.ACC"]

PEAKS = """
from ultra_nb.evaluation import evaluate
from ultra_nb.benchmark import resident_memory
from ultra_nb.models import load
from ultra_nb.datasets import scenes
backbone, peaks = load("scenes_clip"), []
for n in (10, 40):
    evaluate(backbone, scenes("val", n), layer=3)
    peaks.append(resident_memory("VmHWM"))
print(peaks[1] / peaks[0])
"""

def test_memory_stays_flat():
    "Peak memory of forty images is that of ten"
    assert float(run(sys.executable, "-c", PEAKS).stdout) < 1.05

def test_projection_is_learned_killed_and_learned_on(tmp_path):
    "fit-w, killed after its first step: the same bytes of W as without a kill"
    argv = ["scenes", "--images", "24", "--k", "3", "--layer", "4", "--passes", "2", "--seed", "5"]
    assert main(["fit-w", *argv, "--out", str(tmp_path / "whole.safetensors")]) == 0
    again = ["fit-w", *argv, "--out", str(tmp_path / "W.safetensors")]
    checkpoint = tmp_path / "W.safetensors.run/checkpoint.safetensors"
    child.killed([*CLI[:-1], *again], checkpoint, 0, ENV)
    assert main(again) == 0
    assert (tmp_path / "W.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
