"""Every way that was found to lose work, get a wrong number, or wait without a word: one test for each, by the numbers
of the list."""
import ast, base64, builtins, contextlib, hashlib, itertools, json, os, re, resource, shutil, signal, socket, subprocess
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
import numpy as np
import pytest, torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.io import savemat
import child
import ultra_nb.preliminaries as preliminaries
from ultra_nb.datasets import open_data, scenes
from ultra_nb.explanation_maps import explain, minmax, upsample
from ultra_nb.interpretability_metrics import itiou_test, patch_classes, patch_maps, ultra_rows
from ultra_nb.models import load
from ultra_nb.weights import asset
from ultra_nb.preliminaries import attention_tap, class_map
from ultra_nb.segmentation import segment
from ultra_nb.self_consistency import Projection
from ultra_nb.summarization import Scores, word_scores

ROOT = Path(__file__).parent.parent
TEXT = "My brother wants to sell the house. Should I go?"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

@pytest.fixture(scope="module", autouse=True)
def warm(): child.warm()

def ultra(argv, folder, **options): return child.run(argv, folder, **options)

def names(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))

def refused(argv, folder, *words, new=(), **options):
    "Exit code 1, one line with these words in it, and no file that was not there (but `new`)"
    before = names(folder)
    done = ultra(argv, folder, **options)
    assert done.code == 1 and len(done.said) == 1, (done.code, done.out, done.err)
    assert done.said[0].startswith("ultra-nb: ") and len(done.err) < 1000, done.err
    assert all(word in done.said[0] for word in words) and not CONTROL.search(done.out + done.err), done.said
    assert not re.match(r"ultra-nb: \w+Error", done.said[0]), done.said
    assert set(names(folder)) - {*before, *new} == set(), names(folder)

# --- 1. Code that is not ours -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    "A tiny causal language model with its tokenizer, as transformers saves them"
    return child.language_model(tmp_path_factory.mktemp("llama") / "model")

def changed(path, **fields):
    "Some fields of a JSON file"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

def training(folder, llama):
    "A copy of the model, pairs, and settings of a training"
    shutil.copytree(llama, folder / "model")
    pair = dict(prompt=f"{TEXT}\n\nTL;DR:", chosen=" Sell it.", rejected=" Go.")
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    arguments = dict(max_steps=1, use_cpu=True, bf16=False, max_length=64)
    settings = dict(stage="sft", model="model", data="pairs.jsonl", arguments=arguments)
    (folder / "settings.json").write_text(json.dumps(settings))

MAPS = {"config.json": dict(model_type="own", auto_map=dict(AutoConfig="own.Own", AutoModelForCausalLM="own.Own")),
        "tokenizer_config.json": dict(tokenizer_class="Own", auto_map=dict(AutoTokenizer=["own.Own", None]))}

@pytest.mark.parametrize("file", MAPS)
def test_1_code_in_a_model_folder_never_runs(file, llama, tmp_path, monkeypatch):
    "`auto_map` in a folder, and a user (or a pipe) that says yes to everything"
    training(tmp_path, llama)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model/own.py").write_text("open('ran', 'w')\nclass Own: pass\n")
    changed(tmp_path / "model" / file, **MAPS[file])
    done = ultra("train settings.json --out out", tmp_path, stdin=b"y\n" * 9)
    assert not (tmp_path / "ran").exists() and "[y/N]" not in done.out + done.err, done
    assert done.code == 1 and len(done.said) == 1, done

def test_1_every_loading_by_transformers_forbids_code():
    calls = {f"{path.name}:{node.lineno}": {k.arg: getattr(k.value, "value", None) for k in node.keywords}
             for path in (ROOT / "ultra_nb").glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config")}
    assert len(calls) > 5 and [at for at, given in calls.items() if given.get("trust_remote_code") is not False] == []

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n"

@pytest.mark.parametrize("argv, place", [("segment picture.jpg --layer 2", "picture.jpg"),
                                         ("data folder --root own", "own/images/0.png"),
                                         ("data folder --root own", "own/masks/0.png")])
def test_1_a_picture_runs_no_other_program(argv, place, tmp_path):
    "EPS under another ending goes to ghostscript, where Pillow may choose"
    child.pictures(tmp_path / "own"), (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n"), (tmp_path / "bin/gs").chmod(0o755)
    (tmp_path / place).write_bytes(EPS)
    done = ultra(argv, tmp_path, env=dict(PATH=f"{tmp_path}/bin:{os.environ['PATH']}"))
    assert not (tmp_path / "ran").exists() and done.code == 1 and len(done.said) <= 2, done

@pytest.mark.parametrize("place", ["../outside.safetensors", "{}/outside.safetensors"])
def test_1_a_shard_index_names_no_file_outside_its_folder(place, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "outside.safetensors")
    index = dict(weight_map=dict(a=place.format(tmp_path)))
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "text").write_text(TEXT)
    refused(["summarize", "text", "--model", "model", "--summary", "Sell"], tmp_path, "outside")

@pytest.fixture(scope="module")
def figure3(tmp_path_factory):
    "A reproduction of figure 3"
    folder = tmp_path_factory.mktemp("reproduce")
    assert ultra("reproduce fig3 --out report", folder).code == 0
    return folder / "report"

def test_1_a_record_names_no_file_outside_its_folder(figure3, tmp_path):
    "The report would carry the file's content"
    shutil.copytree(figure3, tmp_path / "report")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "mine.png")
    record = json.loads((tmp_path / "report/records/fig3.json").read_text())
    mine = (tmp_path / "mine.png").read_bytes()
    record["settings"]["files"]["../mine.png"] = dict(sha256=hashlib.sha256(mine).hexdigest(), text="mine")
    (tmp_path / "report/records/fig3.json").write_text(json.dumps(record))
    done = ultra("reproduce fig3 --out report", tmp_path)
    page = (tmp_path / "report/index.html").read_text()
    assert base64.b64encode(mine).decode() not in page and len(done.said) <= 2, done

RED = "\x1b[31mred\x07\x9b"
SPEAKING = {
    "a picture": ["segment", RED],
    "a data set": ["data", RED],
    "a root": ["data", "folder", "--root", RED],
    "too many arguments": ["data", "folder", RED],
    "a number": ["evaluate", "scenes", "--limit", RED],
    "a command": [RED],
    "an option": ["data", f"--{RED}"],
    "a device": ["segment", "--device", RED],
    "weights": ["segment", "--weights", RED],
    "a model": ["segment", "--model", RED],
    "a file made": ["segment", "--layer", "2", "--clusters", "2", "--out", f"{RED}.png"],
    "a summary": ["summarize", "text", "--summary", f"the {RED} house"],
    "a folder's name": ["data", "folder", "--root", f"own{RED}"],
    "a bad picture": ["evaluate", "folder", "--root", f"own{RED}", "--scalar", "sum", "--layer", "2"],
    "a figure": ["reproduce", RED],
    "a pair": ["reproduce", "--root", f"{RED}=x"],
}

@pytest.mark.parametrize("what", SPEAKING)
def test_1_control_characters_reach_no_terminal(what, tmp_path):
    (tmp_path / "text").write_text(f"My {RED} brother wants to sell the {RED}house.")
    own = child.pictures(tmp_path / f"own{RED}")
    for part in ("images", "masks"): (own / part / "0.png").rename(own / part / f"{RED}.png")
    if what == "a bad picture": (own / f"images/{RED}.png").write_bytes(b"none")
    done = ultra(SPEAKING[what], tmp_path)
    assert not CONTROL.search(done.out + done.err) and "red" in done.out + done.err, done

# --- 2. Ordinary use --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [(), ("ball", "aeroplane")])
def test_2_class_names_that_a_tokenizer_does_not_know_cost_one_row(classes, tmp_path):
    child.pictures(tmp_path / "own", classes=classes)
    done = ultra("evaluate folder --root own --layer 2", tmp_path)
    assert done.code == 0 and "ULTra_S" in done.out and "LeGrad" in done.out and "class maps" not in done.out, done
    named = "aeroplane" if classes else "class 0"
    assert len(done.said) == 1 and "class maps" in done.said[0] and named in done.said[0], done.said

# --- 3. Memory --------------------------------------------------------------------------------------------------------

PEAK = """
import sys
import child, ultra_nb.cli
from ultra_nb.benchmark import resident_memory
child.warm()
child.limited()
code = ultra_nb.cli.main(sys.argv[1:])
print(code, resident_memory("VmHWM")) # ru_maxrss would count the process that started this one
"""

@pytest.mark.parametrize("command", ["evaluate", "itiou"])
def test_3_a_photograph_of_twelve_megapixels_fits_into_two_gigabytes(command, tmp_path):
    "itiou took 11 GB at 3 megapixels; evaluate 2.3 GB here"
    child.pictures(tmp_path / "own", 1, range(21), size=(30, 40))
    for part, ending in (("images", "jpg"), ("masks", "png")):
        small = Image.open(tmp_path / f"own/{part}/0.png")
        small.resize((4000, 3000), Image.Resampling.NEAREST).save(tmp_path / f"own/{part}/0.{ending}")
    (tmp_path / "own/images/0.png").unlink()
    env = os.environ | dict(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    argv = [sys.executable, "-c", PEAK, command, *"folder --root own --layer 2 --scalar sum".split()]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    code, peak = done.stdout.splitlines()[-1].split()
    assert code == "0" and int(peak) < 2e9, (peak, done.stderr)

def iou(a, b): return 100 * (a & b).sum() / max((a | b).sum(), 1)

def test_3_itiou_has_the_numbers_of_whole_maps(tmp_path):
    "Eq. 17 written out: every map upsampled, thresholded, against the pixels of its class"
    backbone, data = load("scenes_clip"), open_data("folder", child.pictures(tmp_path, 2, (0, 1, 255), size=(45, 70)))
    found, values = itiou_test(backbone, data, layer=3, taus=[.1, .5]).metrics["ULTra_S diagonal"], []
    for sample in data:
        scores = patch_maps(ultra_rows(mode="diagonal"), backbone, backbone.inputs(sample.image), 3, backbone.patches)
        maps = upsample(minmax(scores), backbone.grid, sample.mask.shape).numpy()
        owner, counted, classes = patch_classes(sample.mask, backbone.grid), sample.mask != 255, []
        for c in (0, 1):
            own = [[iou(m[counted] >= tau, sample.mask[counted] == c) for tau in (.1, .5)] for m in maps[owner == c]]
            if own: classes.append(np.mean(own, 0))
        values.append(np.mean(classes, 0))
    assert [found["ITIoU 0.1"], found["ITIoU 0.5"]] == pytest.approx(np.mean(values, 0).tolist(), rel=1e-4)

# --- 4. Long texts ----------------------------------------------------------------------------------------------------

def test_4_truncate_works_without_a_summary(tmp_path, monkeypatch):
    backbone = load("tldr_llama")
    backbone.model.config.max_position_embeddings = 160
    monkeypatch.setattr("ultra_nb.models.load", lambda *args, **kwargs: backbone)
    (tmp_path / "text").write_text(f"{TEXT} " * 20)
    done = ultra("summarize text --truncate --layer 2 --mode diagonal", tmp_path)
    assert done.code == 0 and (tmp_path / "summary.html").exists() and "TL;DR: " in done.out, done

def test_4_words_of_a_long_text_are_scored_at_once():
    "63,000 words took 110 seconds"
    n = 10_000
    words, offsets = ["word"] * n, [(5 * i, 5 * i + 4) for i in range(n)]
    found = Scores([0] * n, (0, n), (n, n + 1), offsets, " ".join(words), "word", torch.arange(n) / 1., words)
    start = time.perf_counter()
    scored = word_scores(found)
    assert time.perf_counter() - start < 1 and [w.score for w in scored] == list(range(n))

# --- 5. Models that are not as they seem ------------------------------------------------------------------------------

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

def vit(**options): return child.vit(depth=2, **options)

@pytest.mark.parametrize("function", [lambda m: explain(m, IMAGE), lambda m: class_map(m, IMAGE, 1)])
def test_5_without_gradients_around_it_a_map_is_the_same(function):
    whole = function(model := vit())
    for context in (torch.no_grad, torch.inference_mode):
        with context(): assert function(model).equal(whole)

def test_5_the_classes_of_a_model_without_a_head_are_refused():
    "Its features would be taken for classes"
    with pytest.raises(ValueError, match="head|class"): class_map(vit(num_classes=0), IMAGE, 1)

@pytest.mark.parametrize("options", [dict(drop_path_rate=.5), dict(proj_drop_rate=.5)])
@pytest.mark.parametrize("function", [lambda m: explain(m, IMAGE), lambda m: class_map(m, IMAGE, 1)])
def test_5_a_pass_that_is_random_is_refused(options, function):
    with pytest.raises(ValueError, match=r"eval\(\)"): function(vit(**options).train())

def compiled_blocks(model):
    for i, block in enumerate(model.blocks): model.blocks[i] = torch.compile(block, backend="aot_eager")

def compiled_in_place(model): model.compile(backend="aot_eager")

@pytest.mark.parametrize("function", [lambda m: explain(m, IMAGE), lambda m: class_map(m, IMAGE, 1)])
@pytest.mark.parametrize("change", [compiled_blocks, compiled_in_place])
def test_5_a_compiled_model_has_the_maps_of_the_model_or_is_refused(change, function):
    model = vit()
    whole = function(model)
    change(model)
    try: found = function(model)
    except ValueError as error: assert "compile" in str(error) and "\n" not in str(error)
    else: assert torch.allclose(found, whole, atol=1e-6)

# --- 6. Wrong without a word ------------------------------------------------------------------------------------------

ONES = torch.ones(197, 192)
def with_one(value): return ONES.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(value))

BAD_W = {"NaN": with_one(torch.nan), "infinite": with_one(torch.inf), "absurd": ONES * 1e38,
         "whole numbers": ONES.long(), "complex": ONES.cfloat()}
USES_W = {"explain": "explain --model scenes_clip --token 5 --mode diagonal --out figure.png",
          "segment": "segment --model scenes_clip --clusters 2",
          "evaluate": "evaluate scenes --limit 2 --out out",
          "perturb": "perturb scenes --limit 2 --tokens 1 --out out",
          "itiou": "itiou scenes --limit 2 --out out"}

@pytest.mark.parametrize("what", BAD_W)
@pytest.mark.parametrize("command", USES_W)
def test_6_a_projection_of_odd_numbers_is_refused(what, command, tmp_path):
    save_file({"W": BAD_W[what]}, tmp_path / "W.safetensors")
    refused(f"{USES_W[command]} --layer 2 --scalar W.safetensors", tmp_path, "W.safetensors")

@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_6_maps_that_are_not_finite_are_refused_by_segment(value):
    maps = torch.rand(196, 196, generator=torch.Generator().manual_seed(0))
    maps[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinity"): segment(maps, (14, 14), (28, 28), k=3)

@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_6_grey_of_sixteen_bits_is_not_white(mode):
    backbone, grey = load("scenes_clip"), np.random.default_rng(0).integers(0, 65536, (60, 60))
    image = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32))
    eight = backbone.inputs(Image.fromarray((grey // 257).astype(np.uint8)))
    assert image.mode == mode and torch.allclose(backbone.inputs(image), eight, atol=.05)

EMPTY = [
    ["explain", ""], ["segment", ""], ["bench", "maps", ""], ["summarize", ""], ["train", ""],
    ["summarize", "text", "--summary", ""], ["summarize", "text", "--summary", " "],
    ["summarize", "text", "--html", ""], ["segment", "--weights", ""], ["segment", "--model", ""],
    ["segment", "--out", ""], ["segment", "--overlay", "", "--out", "m.png"], ["explain", "--scalar", ""],
    ["explain", "--out", ""],
    ["evaluate", "scenes", "--out", ""], ["evaluate", "scenes", "--split", ""], ["evaluate", "folder", "--root", ""],
    ["evaluate", "folder", "--root", "own", "--mask-folder", ""], ["perturb", "scenes", "--out", ""],
    ["itiou", "scenes", "--out", ""], ["fit-w", "scenes", "--out", ""], ["reproduce", "fig3", "--out", ""],
    ["bench", "maps", "--out", ""], ["train", "settings.json", "--out", ""],
    ["train", "settings.json", "--model", "", "--out", "o"],
]

@pytest.mark.parametrize("argv", EMPTY, ids=" ".join)
def test_6_an_empty_argument_is_no_default(argv, tmp_path):
    "As an unset variable of a shell gives one"
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "settings.json").write_text('{"stage": "sft", "model": "m", "data": "d"}')
    child.pictures(tmp_path / "own")
    before = names(tmp_path)
    done = ultra(argv, tmp_path, seconds=8)
    assert done.code in (1, 2) and len(done.said) == 1 and names(tmp_path) == before, (done, names(tmp_path))

@pytest.mark.parametrize("overlay", ["mask.png", "./mask.png", "../here/mask.png", "link.png", "hard.png"])
def test_6_mask_and_overlay_are_two_files(overlay, tmp_path):
    (folder := tmp_path / "here").mkdir()
    if overlay == "link.png": (folder / "link.png").symlink_to("mask.png")
    if overlay == "hard.png":
        (folder / "mask.png").write_bytes(b"mine")
        os.link(folder / "mask.png", folder / "hard.png")
    refused(f"segment --layer 2 --clusters 2 --force --out mask.png --overlay {overlay}", folder, "--overlay")

OUT_OF_RANGE = {
    "evaluate scenes --limit 2 --layer 2 --scalar sum --out out --threshold": ["nan", "-1", "inf", "-inf"],
    "fit-w scenes --images 8 --layer 2 --k 2 --passes 1 --lr": ["nan", "inf", "-1", "0"],
    "fit-w scenes --images 8 --layer 2 --k 2 --passes 1 --delta": ["nan", "inf"],
    "evaluate folder --root own --layer 2 --scalar sum --out out --ignore": ["-1", "256", "300"],
    "data folder --root own --ignore": ["-1", "256"],
    "perturb scenes --limit 2 --layer 2 --out out --seed": ["-1"],
    "fit-w scenes --images 8 --layer 2 --k 2 --passes 1 --seed": ["-1"],
    "evaluate scenes --limit 2 --layer 2 --scalar sum --protocol dataset-hungarian --out out --clusters": ["-1", "0"],
}

@pytest.mark.parametrize("argv, value", [(argv, v) for argv, values in OUT_OF_RANGE.items() for v in values])
def test_6_numbers_out_of_range_are_refused_before_any_work(argv, value, tmp_path):
    "--clusters -1 is the list's number 10: it was refused after all images were done"
    child.pictures(tmp_path / "own")
    refused(f"{argv}={value}", tmp_path, argv.split()[-1].strip("-"))

SMALL = "evaluate folder --root own --layer 2 --scalar sum --out out"

@pytest.fixture
def finished(tmp_path):
    "An evaluation of two pictures that is done"
    child.pictures(tmp_path / "own")
    assert ultra(SMALL, tmp_path).code == 0
    return tmp_path

@pytest.mark.parametrize("part", ["images", "masks"])
def test_6_pictures_replaced_under_their_names_are_noticed(part, finished):
    other = np.asarray(Image.open(finished / f"own/{part}/1.png"))[::-1]
    Image.fromarray(other).save(finished / f"own/{part}/0.png")
    refused(SMALL, finished, "0")

def test_6_rows_outside_the_list_are_refused(finished):
    row = json.loads((finished / "out/rows.jsonl").read_text().splitlines()[0])
    with open(finished / "out/rows.jsonl", "a") as f:
        for i in (-1, 2): f.write(json.dumps(row | dict(i=i)) + "\n")
    refused(SMALL, finished, "rows.jsonl")

FIT = "fit-w scenes --images 8 --layer 2 --k 2 --passes 1 --out W.safetensors"

@pytest.fixture(scope="module")
def half_fitted(tmp_path_factory):
    "What a fit-w leaves that is killed after its last step"
    folder = tmp_path_factory.mktemp("fit")
    def killed(): Projection.save = lambda *args: os._exit(9)
    assert ultra(FIT, folder, before=killed).code == 9
    return folder

def history(n): return dict(history=json.dumps({"loss": [1.] * n, "angle": [1.] * n, "held out": [1.] * 9}))

CHECKPOINTS = { # what changes tensors and meta data
    "theta of another shape": lambda t, m: t.update(theta=t["theta"][:1].clone()),
    "moments of another shape": lambda t, m: t.update(exp_avg=t["exp_avg"][:3].clone()),
    "NaN": lambda t, m: t["theta"].fill_(torch.nan),
    "NaN in the best": lambda t, m: t["best"].fill_(torch.nan),
    "NaN in a moment": lambda t, m: t["exp_avg_sq"].fill_(torch.nan),
    "too long a history": lambda t, m: m.clear() or m.update(history(50)),
    "no history": lambda t, m: m.clear(),
    "a history of text": lambda t, m: m.clear() or m.update(history="{"),
    "no theta": lambda t, m: t.pop("theta"),
    "complex": lambda t, m: t.update(theta=t["theta"].cfloat()),
}

@pytest.mark.parametrize("what", CHECKPOINTS)
def test_6_a_checkpoint_that_does_not_fit_is_refused(what, half_fitted, tmp_path):
    shutil.copytree(half_fitted, tmp_path / "here")
    path = tmp_path / "here/W.safetensors.run/checkpoint.safetensors"
    with safe_open(path, "pt") as f: meta = f.metadata()
    tensors = load_file(path)
    CHECKPOINTS[what](tensors, meta)
    save_file({k: v.clone() for k, v in tensors.items()}, path, meta)
    refused(FIT, tmp_path / "here", "checkpoint.safetensors")

def test_6_a_damaged_checkpoint_is_refused(half_fitted, tmp_path):
    shutil.copytree(half_fitted, tmp_path / "here")
    path = tmp_path / "here/W.safetensors.run/checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refused(FIT, tmp_path / "here", "checkpoint.safetensors")

def test_6_a_rank_without_a_world_is_one_process(tmp_path):
    child.pictures(tmp_path / "own")
    done = ultra("evaluate folder --root own --layer 2 --scalar sum", tmp_path, env=dict(RANK="1"))
    assert done.code == 1 and len(done.said) == 1 or "ULTra_S" in done.out, done
    (tmp_path / "own/images/0.png").write_bytes(b"none")
    done = ultra("evaluate folder --root own --layer 2 --scalar sum", tmp_path, env=dict(RANK="1"))
    assert done.code == 1 and 1 <= len(done.said) <= 2, done

@pytest.mark.parametrize("command", ["evaluate", "itiou"])
def test_6_masks_that_ignore_every_pixel_measure_nothing(command, tmp_path):
    child.pictures(tmp_path / "own", values=(255,))
    done = ultra(f"{command} folder --root own --layer 2 --scalar sum --out out", tmp_path)
    assert done.code == 1 and 1 <= len(done.said) <= 2 and "nan" not in done.out, done
    assert not (tmp_path / "out/result.json").exists()

@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_6_weights_that_are_whole_or_complex_numbers_are_refused(dtype, ending, tmp_path):
    state = load_file(asset("scenes_clip.safetensors"))
    state["visual.conv1.weight"] = state["visual.conv1.weight"].to(dtype)
    (save_file if ending == ".safetensors" else torch.save)(state, tmp_path / f"weights{ending}")
    line = f"segment --model scenes_clip --layer 2 --clusters 2 --weights weights{ending}"
    refused(line, tmp_path, "visual.conv1.weight")

# --- 7. Interrupts ----------------------------------------------------------------------------------------------------

QUERY = torch.rand(1, 1, 3, 2)

def interrupted(work, n):
    """Runs `work` and raises KeyboardInterrupt at the n-th instruction in the files of taps and contexts; False where
    it has fewer"""
    left = n
    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in (preliminaries.__file__, contextlib.__file__): return None
        frame.f_trace_opcodes = True
        if event == "opcode": left -= 1
        if left == 0 and event == "opcode": raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    try: work()
    except KeyboardInterrupt: pass
    finally: sys.settrace(None)
    return left <= 0

def restored_at_each(work, good, step=1, least=50):
    "Interrupts `work` at every step-th of its instructions in turn, in a child: after each of them `good` must hold"
    def each():
        n = 1
        while interrupted(work, n):
            assert good(), f"not restored after an interrupt at instruction {n}"
            n += step
        assert n > step * least
    done = child.call(each, seconds=30)
    assert done.code == 0, "a lock was left held" if done.code in child.TOO_LONG else done.err.splitlines()[-1]

def test_7_attention_is_restored_after_an_interrupt_at_any_instruction():
    "And a tap opened later still works: no lock is left held"
    fused, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
    whole = lambda: F.scaled_dot_product_attention is fused and torch.backends.mha.get_fastpath_enabled() == fast
    def work():
        with attention_tap() as tap: F.scaled_dot_product_attention(QUERY, QUERY, QUERY)
        return tap
    restored_at_each(work, lambda: whole() and len(work().attention) == 1 and whole())

def test_7_a_model_keeps_no_hooks_after_an_interrupt():
    "A hook that stayed would put taped tokens into the model's later passes"
    model = vit()
    hooks = lambda: [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    restored_at_each(lambda: preliminaries.tape(model, model.blocks, IMAGE), lambda: not hooks(), step=7)

def imports_interrupted(n):
    "Makes the n-th import statement from now on raise KeyboardInterrupt"
    real, count = builtins.__import__, 0
    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == n: raise KeyboardInterrupt
        return real(*args, **kwargs)
    builtins.__import__ = counted

COMMANDS = ["segment --layer 2 --clusters 2", "explain --layer 2 --token 3", "evaluate scenes --limit 2 --layer 2",
            "fit-w scenes --images 8", "summarize text", "train settings.json --out out", "reproduce fig3", "doctor",
            "data"]

def test_7_an_interrupt_that_an_import_makes_another_error_of(tmp_path):
    "torch's modules that are not there yet answered with RecursionError, the interrupt forgotten"
    def forgetting(args):
        try: signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt: pass
        raise RecursionError("maximum recursion depth exceeded")
    def before():
        import ultra_nb.cli
        ultra_nb.cli._run = forgetting
    done = ultra("doctor", tmp_path, before=before)
    assert done.code == 130 and done.said == ["ultra-nb: interrupted"], done

@pytest.mark.parametrize("argv", COMMANDS)
def test_7_an_interrupted_import_has_exit_code_130(argv, tmp_path):
    (tmp_path / "text").write_text(TEXT), (tmp_path / "settings.json").write_text("{}")
    for n in (1, 2, 3, 5, 8, 13):
        done = ultra(argv, tmp_path, before=partial(imports_interrupted, n))
        if done.code == 0: break # it has fewer
        assert done.code == 130 and len(done.said) <= 1, (n, done)

# a job in the background ignores interrupts
HEEDS = partial(signal.signal, signal.SIGINT, signal.default_int_handler)

def test_7_an_interrupt_in_code_made_from_text(tmp_path):
    "As a dataclass is: Python then ended by the signal, although 130 was returned"
    (tmp_path / "interrupted.py").write_text("""
import signal, sys
import ultra_nb.cli
ultra_nb.cli._run = lambda argv: exec("signal.raise_signal(signal.SIGINT)", dict(signal=signal))
sys.exit(ultra_nb.cli.main(["doctor"]))
""")
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, env=env, capture_output=True, text=True,
                          preexec_fn=HEEDS)
    assert done.returncode == 130 and done.stderr == "ultra-nb: interrupted\n", done

@pytest.mark.parametrize("seconds", [.8, 1.5, 3])
def test_7_a_real_interrupt_while_it_starts(seconds, tmp_path):
    argv = [sys.executable, "-m", "ultra_nb.cli", "evaluate", "scenes", "--device", "cpu"]
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    going = subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=HEEDS)
    time.sleep(seconds)
    going.send_signal(signal.SIGINT)
    err = going.communicate()[1]
    assert going.returncode == 130 and len(err.splitlines()) <= 2 and "Traceback" not in err, err

# --- 8. Devices, the hub, long errors, places to write to -------------------------------------------------------------

@pytest.mark.parametrize("device", ["hpu", "privateuseone", "meta", "cuda:-1", "", "nothing", "mkldnn"])
def test_8_an_unknown_device_is_one_line(device, tmp_path):
    done = ultra(["segment", "--layer", "2", "--clusters", "2", "--device", device], tmp_path)
    assert done.code == 2 and len(done.said) == 1 and len(done.said[0]) < 200, done
    assert "no device" in done.said[0] or not device and "--device is empty" in done.said[0], done

def answer_503(connection, number):
    connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

def answer_once(connection, number):
    "Answers the first request, then never again"
    if number == 0: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    else: time.sleep(60)

def answer_in_drips(connection, number):
    "The head of an answer, a byte now and then"
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"." * 1000: connection.sendall(bytes([byte])), time.sleep(.2)

@contextlib.contextmanager
def hub(answer):
    "Address of a server that reads requests and answers them in its way; it tells the answer the request's number"
    def serve():
        with contextlib.suppress(OSError):
            for number in itertools.count():
                threading.Thread(target=one, args=(server.accept()[0], number), daemon=True).start()
    def one(connection, number):
        with contextlib.suppress(OSError), connection:
            connection.recv(65536)
            answer(connection, number)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"

def at(address, cache):
    "Turns the hub's client to an address"
    from huggingface_hub import constants
    constants.HF_HUB_OFFLINE, constants.ENDPOINT, constants.HF_HUB_CACHE = False, address, str(cache)
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"

def test_8_a_hub_that_is_unwell_costs_ten_seconds_and_one_line(tmp_path):
    "503, silence after the first answer, or drips; for a file and for a folder; all at once"
    answers, models = (answer_503, answer_once, answer_in_drips), ("clip_vitb32", "facebook/dino-vits8")
    cases = [*itertools.product(answers, models)]
    def told(case):
        answer, model = case
        (folder := tmp_path / f"{answer.__name__}-{model[:4]}").mkdir()
        env = dict(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        with hub(answer) as address:
            there = partial(at, address, folder / "cache")
            return ultra(["segment", "--model", model], folder, before=there, env=env, seconds=20)
    with ThreadPoolExecutor(len(cases)) as pool: found = list(pool.map(told, cases))
    for case, done in zip(cases, found, strict=True):
        assert done.code == 1 and done.seconds < 14 and len(done.said) == 1, (case, done)
        assert "--weights" in done.said[0] and len(done.said[0]) < 500, (case, done)

ODD_TENSORS = {"sparse": lambda: torch.eye(50).to_sparse(),
               "without numbers": lambda: torch.empty(3, device="meta"),
               "nested": lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)])}

@pytest.mark.parametrize("what", ODD_TENSORS)
def test_8_tensors_of_an_odd_kind_are_one_short_line(what, tmp_path):
    torch.save({"visual.proj": ODD_TENSORS[what]()}, tmp_path / "weights.pth")
    refused("segment --model scenes_clip --layer 2 --clusters 2 --weights weights.pth", tmp_path, "weights.pth")

def test_8_a_file_that_holds_no_projection_is_one_short_line(tmp_path):
    file = asset("scenes_clip.safetensors")
    refused(["explain", "--layer", "2", "--token", "3", "--scalar", file], tmp_path, "not a projection W")

def shell(line, folder, **env):
    "A line of shell in which `ultra` is the command line"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    env = kept | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1") | env
    ultra = f"ultra() {{ '{sys.executable}' -m ultra_nb.cli \"$@\"; }}"
    return subprocess.run(["bash", "-c", f"{ultra}; {line}"], cwd=folder, env=env, capture_output=True)

@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-"])
def test_8_closed_outputs_are_no_error(closed, tmp_path):
    child.pictures(tmp_path / "own")
    done = shell(f"ultra data folder --root own {closed}", tmp_path)
    assert done.returncode == 0 and done.stderr == b"", done
    done = shell(f"ultra data folder --root nowhere {closed}", tmp_path)
    assert done.returncode == 1 and b"nowhere" not in done.stdout, done
    assert (b"nowhere" in done.stderr) == ("2>&-" not in closed), done

ASCII = [dict(PYTHONIOENCODING="ascii"), dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")]

@pytest.mark.parametrize("env", ASCII, ids=str)
def test_8_names_that_the_terminal_cannot_write_are_no_error(env, tmp_path):
    child.pictures(tmp_path / "Bücher")
    assert shell("ultra data folder --root Bücher", tmp_path, **env).returncode == 0

def test_8_a_file_name_that_is_no_text_is_no_error(tmp_path):
    argv = ["segment", "--layer", "2", "--clusters", "2", "--out", os.fsdecode(b"mask\xff.png")]
    assert ultra(argv, tmp_path).code == 0

# --- 9. Work that runs long -------------------------------------------------------------------------------------------

LONG = ["explain --image-size 2000 --token 3", "segment --image-size 2000", "fit-w scenes --images 1000000",
        "evaluate scenes --limit 1000000000", "itiou scenes --limit 1000000000 --out out"]

@pytest.mark.parametrize("argv", LONG)
def test_9_long_work_says_so_within_two_seconds(argv, tmp_path):
    "Killed after some seconds, it has told of itself, more than the model's name; or it was refused"
    done = ultra(argv, tmp_path, before=child.limited, seconds=5)
    told = "".join(line for line in re.split(r"[\r\n]", done.err) if not line.startswith("Backbone("))
    refused_at_once = done.code == 1 and len(done.said) == 1 and "Error" not in done.said[0]
    assert told.strip() and (done.code in child.TOO_LONG or refused_at_once), done

def test_9_scenes_are_made_as_they_are_needed():
    start = time.perf_counter()
    data = scenes("val", 10**6)
    assert time.perf_counter() - start < .2 and len(data) == 10**6 and data[10**6 - 1].name == f"val {10**6 - 1}"

# --- 10. Messages that say what is wrong with what --------------------------------------------------------------------

DAMAGE = {"empty": b"", "cut": b'{"a": 1, "b', "a list": b"[1]\n", "a number": b"1\n", "no text": b"\xff\xfe\n",
          "strange": b'{"strange": 1}\n', "a row of nothing": b'{"i": 0, "name": "0"}\n'}
HARMLESS = {("rows.jsonl", "empty"), ("rows.jsonl", "cut"), ("part-0.jsonl", "empty"), ("part-0.jsonl", "cut"),
            ("problems.json", "strange")} # as a run leaves them that is killed, or keys that nobody asks for
ANY_FILE = ["empty", "cut", "a list", "a number", "no text", "strange"] # damage for files of every kind

def harmful(files, damage): return [pair for pair in itertools.product(files, damage) if pair not in HARMLESS]

@pytest.mark.parametrize("file, what", harmful(["settings.json", "rows.jsonl", "part-0.jsonl"], DAMAGE))
def test_10_a_damaged_file_of_a_run_is_named(file, what, finished):
    (finished / "out" / file).write_bytes(DAMAGE[what])
    refused(SMALL, finished, file)

def one_line(done, *words):
    "Exit code 1 and one line that is no exception's name"
    assert done.code == 1 and len(done.said) == 1 and all(word in done.said[0] for word in words), done
    assert len(done.said[0]) < 500 and not re.match(r"ultra-nb: \w+Error", done.said[0]), done

@pytest.mark.parametrize("file, what", harmful(["reproduction.json", "records/fig3.json", "problems.json"], ANY_FILE))
def test_10_a_damaged_file_of_a_reproduction_is_named_or_made_again(file, what, figure3, tmp_path):
    shutil.copytree(figure3, tmp_path / "report")
    (tmp_path / "report" / file).write_bytes(DAMAGE[what])
    done = ultra("reproduce fig3 --out report", tmp_path)
    if done.code == 0: assert not done.said, done
    else: one_line(done, file)

MODEL_FILES = ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
               "generation_config.json"]

@pytest.mark.parametrize("what", ANY_FILE)
@pytest.mark.parametrize("file", MODEL_FILES)
def test_10_a_damaged_file_of_a_model_is_named(file, what, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(DAMAGE[what]), (tmp_path / "text").write_text(TEXT)
    done = ultra(["summarize", "text", "--model", "model", "--summary", "Sell"], tmp_path)
    if done.code: one_line(done, "model")

SETTINGS = {"no stage": b'{"model": "m"}', "no data": b'{"stage": "sft"}',
            "numbers": b'{"stage": "sft", "model": 1, "data": 2}'}

@pytest.mark.parametrize("what", DAMAGE | SETTINGS)
def test_10_damaged_settings_of_a_training_are_named(what, tmp_path):
    (tmp_path / "settings.json").write_bytes((DAMAGE | SETTINGS)[what])
    refused("train settings.json --out out", tmp_path)

@pytest.mark.parametrize("learned", ["{", "[]", '{"provenance": 1}', '{"provenance": {}, "strange": 1}'])
def test_10_a_projection_with_odd_notes_is_named(learned, tmp_path):
    save_file({"W": ONES}, tmp_path / "W.safetensors", dict(learned=learned))
    refused("explain --layer 2 --token 3 --scalar W.safetensors", tmp_path, "W.safetensors")

def full(size):
    "Files end at so many bytes, as on a full disk"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def test_10_a_full_disk_names_the_file(tmp_path):
    "The system's error for a write has no name of a file"
    new = ["out", *(f"out/{name}" for name in ("settings.json", ".part-0.lock", "part-0.jsonl", "rows.jsonl"))]
    argv = "evaluate scenes --limit 2 --layer 2 --scalar sum --out out"
    refused(argv, tmp_path, "out/", new=new, before=lambda: full(900))

@pytest.mark.parametrize("n", [256, 257, 300])
def test_10_more_classes_than_a_mask_can_tell_apart_are_refused(n, tmp_path):
    child.pictures(tmp_path / "own", classes=[f"c{i}" for i in range(n)])
    refused(SMALL, tmp_path, "classes.txt")

MATS = {
    "numbers with fractions": dict(img=np.zeros((200, 200, 4))),
    "one channel": dict(img=np.zeros((200, 200, 1), np.uint8)),
    "grey": dict(img=np.zeros((200, 200), np.uint8)),
    "text": dict(img="text"),
    "cells": dict(img=np.array([1, "a"], object)),
    "nothing": dict(img=np.zeros((0, 0, 4), np.uint8), gt=np.zeros((0, 0), np.int32)),
    "labels that are NaN": dict(gt=np.full((200, 200), np.nan)),
    "labels in layers": dict(gt=np.zeros((200, 200, 2), np.int32)),
    "labels of text": dict(gt="x"),
    "labels in a struct": dict(gt=dict(a=1)),
}

def crops(root):
    "Potsdam as STEGO's archive has it, two crops"
    for part in ("imgs", "gt"): (root / part).mkdir(parents=True)
    classes = np.random.default_rng(0).integers(0, 6, (200, 200)).astype(np.int32)
    for i in range(2):
        savemat(root / f"imgs/{i}.mat", dict(img=np.zeros((200, 200, 4), np.uint8)))
        savemat(root / f"gt/{i}.mat", dict(gt=classes))
    (root / "labelled_test.txt").write_text("0\n1\n")

def one_bad(done, file):
    "One image measured, the other named with what is wrong; exit code 0, as --skip-bad asks"
    assert done.code == 0 and "1 images of" in done.out and len(done.said) == 1, done
    assert done.said[0].startswith("not measured: ") and file in done.said[0], done

@pytest.mark.parametrize("what", MATS)
def test_10_a_mat_file_of_odd_content_is_one_bad_image(what, tmp_path):
    crops(tmp_path / "own")
    for key, value in MATS[what].items():
        part = "imgs" if key == "img" else key
        savemat(tmp_path / f"own/{part}/0.mat", {key: value})
    one_bad(ultra("evaluate potsdam --root own --layer 2 --scalar sum --skip-bad", tmp_path), "0.mat")

def test_10_a_mat_file_that_kills_its_reader_is_one_bad_image(tmp_path):
    "Some damaged headers end SciPy's reader with a segmentation fault"
    crops(tmp_path / "own")
    raw = bytearray((tmp_path / "own/imgs/0.mat").read_bytes())
    raw[184] = 8 # the type of the numbers, which is looked up in a table without a look at its end
    (tmp_path / "own/imgs/0.mat").write_bytes(raw)
    one_bad(ultra("evaluate potsdam --root own --layer 2 --scalar sum --skip-bad", tmp_path), "0.mat")

def test_10_a_name_that_is_no_text_is_an_image_like_others(tmp_path):
    "b'a\\xff.png' is a fine name to Linux"
    own = os.fsencode(child.pictures(tmp_path / "own"))
    for part in (own + b"/images", own + b"/masks"): os.rename(part + b"/0.png", part + b"/a\xff.png")
    done = ultra(SMALL, tmp_path)
    assert done.code == 0 and "2 images of" in done.out, done
    Path(os.fsdecode(own + b"/images/a\xff.png")).write_bytes(b"none")
    shutil.rmtree(tmp_path / "out")
    one_bad(ultra(f"{SMALL} --skip-bad", tmp_path), "xff")

@pytest.mark.parametrize("stdin", [True, False])
def test_10_a_text_that_is_no_text_is_named(stdin, tmp_path):
    (tmp_path / "text").write_bytes(b"My br\xffother")
    refused(["summarize", "-" if stdin else "text", "--summary", "Sell"], tmp_path, "UTF-8", stdin=b"My br\xffother")

def test_10_a_summary_that_is_no_text_is_named(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    refused(["summarize", "text", "--summary", "Sell \udcff"], tmp_path, "summary")

# --- 11. What is left behind ------------------------------------------------------------------------------------------

def killed_at_replace(name):
    "Makes the process die when it is about to move a file into place under this name"
    real = os.replace
    def replace(source, target, **where):
        if Path(target).name == name: os._exit(9)
        return real(source, target, **where)
    os.replace = replace

CLAIMS = [("evaluate scenes --limit 2 --layer 2 --scalar sum --out out", "settings.json"),
          ("reproduce fig3 --out out", "reproduction.json"),
          (FIT.replace("--out", "--force --out"), "settings.json")]

@pytest.mark.parametrize("argv, file", CLAIMS)
def test_11_a_death_before_a_folder_is_claimed_leaves_it_usable(argv, file, tmp_path):
    assert ultra(argv, tmp_path, before=lambda: killed_at_replace(file)).code == 9
    done = ultra(argv, tmp_path)
    left = [n for n in names(tmp_path) if "part" in n and not n.endswith(".lock") or "tmp" in n]
    assert done.code == 0 and not left, (done, names(tmp_path))

WRONG_OPTION = {
    "fit-w scenes --images 8 --layer 2 --passes 1": ["--k 999", "--k 0", "--k -1", "--layer 99"],
    "evaluate scenes --limit 2 --layer 2 --scalar sum --out out": [
        "--linkage foo", "--metric foo", "--linkage ward", "--order paper", "--protocol foo", "--k 999",
        "--threshold .4 --baselines", "--clusters -1 --protocol dataset-majority",
        "--clusters 99999 --protocol dataset-majority"],
    "perturb scenes --limit 2 --layer 2 --out out": [
        "--order paper", "--tokens 0", "--tokens 999", "--share nan", "--share 0", "--seed -1"],
    "itiou scenes --limit 2 --layer 2 --out out": ["--order paper", "--tau nan", "--tau 2"],
}

WRONG_OPTIONS = [(argv, option) for argv, options in WRONG_OPTION.items() for option in options]

@pytest.mark.parametrize("argv, option", WRONG_OPTIONS)
def test_11_a_wrong_option_claims_no_folder(argv, option, tmp_path):
    "So that the corrected command can have it"
    refused(f"{argv} {option}", tmp_path)

WRONG_STAGE = ['{"stage": "foo", "model": "m", "data": "d"}',
               '{"stage": "sft", "model": "m", "data": "nowhere.jsonl"}', "{}"]

@pytest.mark.parametrize("content", WRONG_STAGE)
def test_11_a_wrong_stage_claims_no_folder(content, tmp_path):
    (tmp_path / "settings.json").write_text(content)
    refused("train settings.json --out out", tmp_path)

EXPLAIN, OVERLAY = "explain --layer 2 --token 5 --out", "segment --layer 2 --clusters 3 --overlay"
PARTIAL = {**{f"figure.{e}": f"{EXPLAIN} figure.{e}" for e in ("png", "pdf", "svg")},
           "mask.png": "segment --clusters 20 --out mask.png",
           **{f"overlay.{e}": f"{OVERLAY} overlay.{e}" for e in ("png", "jpg", "webp")},
           "page.html": "explain --html page.html", "summary.html": "summarize text --summary Sell"}

@pytest.mark.parametrize("old", [b"", b"mine"])
@pytest.mark.parametrize("file", PARTIAL)
def test_11_a_full_disk_leaves_no_half_file(file, old, tmp_path):
    "And what was there, with --force, is still there"
    (tmp_path / "text").write_text(TEXT)
    if old: (tmp_path / file).write_bytes(old)
    before = names(tmp_path)
    done = ultra(f"{PARTIAL[file]} --force", tmp_path, before=lambda: full(700))
    assert done.code == 1 and len(done.said) <= 2 and file in done.said[-1], done
    assert names(tmp_path) == before, (done, names(tmp_path))
    assert not old or (tmp_path / file).read_bytes() == old

def test_11_a_user_s_own_part_file_is_left_alone(tmp_path):
    (tmp_path / "text").write_text(TEXT), (tmp_path / "summary.html.part").write_text("mine")
    assert ultra("summarize text --summary Sell", tmp_path).code == 0
    assert (tmp_path / "summary.html.part").read_text() == "mine"

def test_11_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "summary.html.part").symlink_to("mine")
    assert ultra("summarize text --summary Sell", tmp_path).code == 0
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "summary.html").is_symlink()

def test_11_a_foreign_file_in_the_folder_of_checkpoints_is_no_failure(half_fitted, tmp_path):
    shutil.copytree(half_fitted, tmp_path / "here")
    (tmp_path / "here/W.safetensors.run/notes.txt").write_text("mine")
    done = ultra(FIT, tmp_path / "here")
    left = names(tmp_path / "here")
    assert done.code == 0, done
    assert left == ["W.safetensors", "W.safetensors.run", "W.safetensors.run/notes.txt"]
