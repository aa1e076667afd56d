"The benchmarks as commands and tables; what the numbers are is no matter of tests."
import json
import pytest
from ultra_nb.benchmark import CURVES, bench_sizes, sizes_figure, sizes_table, slopes
from ultra_nb.cli import main

TIMES = ("per token", "exact", "diagonal", "forward")

def measured(tmp_path, words):
    "The record that a command leaves"
    kept = tmp_path / "record.json"
    assert main([*f"bench {words}".split(), "--out", str(kept)]) == 0
    return json.loads(kept.read_text())

def test_maps(tmp_path, capsys):
    record = measured(tmp_path, "maps --model scenes_dino --layer 2 --image-size 64 --repeats 1")
    found, settings = record["metrics"], record["settings"]
    assert settings.items() >= dict(name="scenes_dino", layer=2, image_size=64, repeats=1).items()
    assert all(found[f"{name} seconds per image"] > 0 and found[f"{name} peak MB"] >= 0 for name in TIMES)
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table[1:5]] == list(TIMES) and table[-1] == str(tmp_path / "record.json")

def test_an_older_record_stays(tmp_path, capsys):
    (tmp_path / "record.json").write_text("mine")
    assert main(["bench", "maps", "--out", str(tmp_path / "record.json")]) == 1
    assert (tmp_path / "record.json").read_text() == "mine" and "--force" in capsys.readouterr().err

def test_evaluate(tmp_path):
    record = measured(tmp_path, "evaluate scenes --limit 2 --model scenes_dino")
    found = record["metrics"]
    assert record["n"] == found["pictures"] == 2 and found["pictures per second"] > 0
    assert sum(found[f"{part} share"] for part in ("loading", "model", "clustering")) == pytest.approx(1)
    assert {"ULTra_S", "ULTra_E", "latent tokens", "one cluster"} <= set(record["settings"]["methods"])

def test_what_is_for_a_gpu_works_with_small_models(tmp_path, capsys):
    stages = measured(tmp_path, "gpu --device cpu --quick")["metrics"]
    assert list(stages) == ["matrix products", "test_vit", "precision of test_vit", "contribution scores", "DPO"]
    assert not any("error" in stage for stage in stages.values()) and stages["DPO"]["seconds of a step"] > 0
    assert "DPO: seconds of a step = " in capsys.readouterr().out

def test_a_stage_that_fails_is_named_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    def broken(*_): raise MemoryError("no room\nat all")
    monkeypatch.setattr("ultra_nb.benchmark._stages", lambda *_, **__: dict(first=broken, second=lambda: dict(a=1.5)))
    kept = tmp_path / "record.json"
    assert main(["bench", "gpu", "--quick", "--device", "cpu", "--out", str(kept)]) == 1
    assert "not measured: first" in capsys.readouterr().err
    stages = json.loads(kept.read_text())["metrics"]
    assert stages["first"]["error"] == "MemoryError: no room at all" and stages["second"]["a"] == 1.5

def test_a_cpu_is_not_asked_for_days(capsys):
    assert main(["bench", "gpu", "--device", "cpu"]) == 1 and "add --quick" in capsys.readouterr().err

def test_sizes():
    found = bench_sizes((112, 224), text=64, turns=1)
    assert [found[size]["tokens"] for size in ("112", "224", "64")] == [50, 197, 64]
    pictures = found["112"], found["224"]
    assert all(one[name] > 0 for one in pictures for name in CURVES) and set(found["peak MB"]) == {"224", "64"}
    steep = slopes(found, list(CURVES))
    assert steep["per token"] > steep["forward"] # each token costs passes of its own
    lines = sizes_table(found).splitlines()
    assert lines[1].split()[:2] == ["forward", "197"] and sum(line.split()[-3] == "64" for line in lines[1:]) > 3
    legend, = (ax.get_legend() for ax in sizes_figure(found).axes)
    assert [text.get_text().split(" (")[0] for text in legend.get_texts()] == list(CURVES.values())
