"""`ultra-nb reproduce`: killed and started again, checked a second time, and the paper profile's own path on what is
small."""
import json, os, signal, subprocess, sys, time
import numpy as np, pandas as pd, pytest, timm, torch
from PIL import Image
from safetensors.torch import save_file
from ultra_nb.cli import ENTRY_NAMES, main
from ultra_nb.scenes import scene
from ultra_nb.entries import ENTRIES, PAPER_MODELS, entry_names, paper_table

def command(out, *what):
    return [sys.executable, "-m", "ultra_nb.cli", "reproduce", *what, "--limit", "4", "--out", str(out)]

ENV = os.environ | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

def start(out, *what): return subprocess.run(command(out, *what), capture_output=True, text=True, env=ENV)

def contents(folder):
    "Every file that is the same for the same result: figures, tables, rows and results of runs"
    kept = [p for p in folder.rglob("*")
            if p.suffix in (".png", ".csv", ".jsonl") or p.name in ("result.json", "settings.json")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in kept}

def test_killed_and_started_again(tmp_path):
    """SIGKILL while the second entry has some of its images: the first is not made again, the second goes on, and all
    is as if nothing had happened"""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, "fig13", "table3").returncode == 0
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command(broken, "fig13", "table3"), **quiet, env=ENV, start_new_session=True)
    lines = lambda: sum(len(p.read_text().splitlines()) for p in broken.glob("runs/perturbed-*/part-0.jsonl"))
    until = time.monotonic() + 240
    while not lines() and time.monotonic() < until: assert process.poll() is None; time.sleep(.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < lines() < 4 and not (broken / "records/table3.json").exists() and not (broken / "index.html").exists()
    first = (broken / "records/fig13.json").read_bytes()
    kept = {line for p in broken.glob("runs/perturbed-*/part-0.jsonl") for line in p.read_text().splitlines()[:-1]}
    again = start(broken, "fig13", "table3")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-3] == "fig13   complete" and (broken / "records/fig13.json").read_bytes() == first
    assert contents(broken) == contents(whole)
    assert kept <= {line for p in broken.glob("runs/perturbed-*/rows.jsonl") for line in p.read_text().splitlines()}

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce") / "report"
    assert main(["reproduce", "fig1", "table8", "--limit", "3", "--out", str(out)]) == 0
    return out

def files(out):
    kept = [p for p in out.rglob("*") if p.is_file() and p.name not in (".lock", "reproduction.json", "problems.json")]
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in kept}

def test_a_second_start_only_checks(done, capsys):
    before = files(done)
    assert main(["reproduce", "fig1", "table8", "--limit", "3", "--out", str(done)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "complete" in line]
    assert said == ["fig1    complete", "table8  complete"]
    assert files(done) == before

def test_what_is_gone_or_other_is_made_again(done, capsys, monkeypatch):
    (done / "tables/table8.csv").unlink()
    assert main(["reproduce", "fig1", "table8", "--limit", "3", "--out", str(done)]) == 0
    said = capsys.readouterr().out
    assert "fig1    complete" in said and "table8  tables/table8.csv is gone: made again" in said
    assert (done / "tables/table8.csv").exists()
    monkeypatch.setattr("ultra_nb.entries.code_hash", lambda: "other")
    assert main(["reproduce", "fig1", "--limit", "3", "--out", str(done)]) == 0
    assert "fig1    made with other code: made again" in capsys.readouterr().out

HOLD = """import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""

def test_one_process_at_a_time(done, capsys):
    argv = [sys.executable, "-c", HOLD, str(done / ".lock")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert main(["reproduce", "fig1", "--limit", "3", "--out", str(done)]) == 1
        other.stdin.close()
    assert "another process is writing" in capsys.readouterr().err

def test_every_table_and_figure_has_an_entry():
    assert entry_names() == ENTRY_NAMES == [f"table{i}" for i in range(1, 9)] + [f"fig{i}" for i in range(1, 14)]
    assert all(e.title and e.needs and e.seconds for e in ENTRIES.values())
    assert sum(e.seconds for e in ENTRIES.values()) < 2 * 20 * 60 # on two cores

def test_an_embedded_row_has_a_record_and_no_difference(done):
    table = pd.read_csv(done / "tables/table8.csv", keep_default_na=False)
    ours = table[table.status == "embedded only"]
    assert len(ours) == 6 and set(ours.difference) == {""} and set(ours.paper) == {""}
    assert set(table[table.status != "embedded only"].ours) == {""}
    record = json.loads((done / "records/table8.json").read_text())
    assert (record["n"], record["seed"], record["protocol"]) == (3, 0, "image-hungarian")
    state = record["settings"]["state"]
    assert state["code"] and state["models"]["scenes_clip"]
    for row in ours.itertuples():
        metric = f"{row.model}, scenes val, layer 7, threshold 0.4: {row.method} {row.metric}"
        assert round(record["metrics"][metric], 1) == float(row.ours)

def test_figures_are_for_print(done):
    assert Image.open(done / "figures/figure1.png").info["dpi"] == pytest.approx((200, 200), abs=.1)
    assert (done / "figures/figure1.svg").read_text().startswith("<?xml")

def test_the_folder_of_another_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["reproduce", "fig1", "--out", str(tmp_path)]) == 1
    assert "holds other files (thesis.tex)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    "Three pictures laid out as VOC, and weights of the paper's DINO ViT-S/16 that are random numbers"
    root = tmp_path_factory.mktemp("paper")
    base = root / "data/VOCdevkit/VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"): (base / part).mkdir(parents=True)
    for i in range(3):
        sample = scene(i)
        Image.fromarray(sample.image).save(base / f"JPEGImages/p{i}.jpg")
        Image.fromarray(sample.mask.astype(np.uint8)).save(base / f"SegmentationClass/p{i}.png")
    for split in ("train", "val"): (base / f"ImageSets/Segmentation/{split}.txt").write_text("p0\np1\np2\n")
    torch.manual_seed(0)
    save_file(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), root / "dino.safetensors")
    return root

def test_the_paper_profile_does_what_it_can(paper, tmp_path, capsys):
    out = tmp_path / "report"
    argv = ["reproduce", "table2", "table5", "table7", "fig3", "fig13", "fig5", "--profile", "paper", "--limit", "2"]
    given = ["--root", f"voc={paper / 'data'}", "--weights", f"dino_vits16={paper / 'dino.safetensors'}"]
    code = main([*argv, "--out", str(out), *given])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    missing = [line for line in lines if line.startswith("missing: ")]
    assert code == 1 and lines[:len(missing)] == missing, said.out
    models, sets = {*PAPER_MODELS.values(), "llama2_7b"}, {"voc", "coco-stuff", "cityscapes", "potsdam"}
    weights = [line for line in missing if "--weights" in line]
    assert {m for m in models if any(m in line for line in weights)} == models - {"dino_vits16"}
    assert {d for d in sets if any(f"--root {d}=DIR" in line for line in missing)} == sets - {"voc"}
    lacking = "4 of 6 are not there, or only in part (table2, table5, table7, fig5)"
    assert said.err.strip().splitlines()[-1].startswith(f"ultra-nb: {lacking}")
    table = pd.read_csv(out / "tables/table2.csv", keep_default_na=False).query("method == 'ULTra'")
    row = table.query("family == 'dino' and model == 'ViT-S/16' and scalar == 'sum'").iloc[0]
    kept, = (json.loads(p.read_text()) for p in out.glob("runs/segments-dino_vits16-voc-*/result.json"))
    assert float(row.ours) == round(kept["metrics"]["ULTra_S"][row.metric], 1)
    assert (row.status, row.difference) == ("in part: 2 of 1449 images", "")
    clip = table.query("family == 'clip' and model == 'ViT-L/14' and scalar == 'sum'")
    assert clip.status.item() == "not run: needs clip_vitl14"
    assert not (out / "tables/table5.csv").exists()
    assert (out / "figures/figure3.png").exists() and (out / "figures/figure13.png").exists()
    page = (out / "index.html").read_text()
    assert "in part: 2 of 1449 images" in page and "Not in it" in page and str(paper) not in page
    # it remembers where things lie
    assert main(["reproduce", "fig3", "--profile", "paper", "--limit", "2", "--out", str(out)]) == 0
    assert "fig3    complete" in capsys.readouterr().out

def test_table_3_is_a_part_of_table_6():
    both = paper_table("table6").merge(paper_table("table3"))
    assert len(both) == len(paper_table("table3")) == 24
