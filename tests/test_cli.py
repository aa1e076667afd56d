"The command line as a stranger meets it: odd pictures, damaged files, folders that cannot be written."
import argparse, os, pickle, subprocess, sys
from pathlib import Path
import numpy as np
import pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from ultra_nb.cli import main, parser
from ultra_nb.weights import asset

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
RGB = Image.fromarray(PIXELS)

def exif(path):
    turned = Image.Exif()
    turned[0x0112] = 6
    RGB.save(path, exif=turned)

READABLE = {
    "cmyk.jpg": lambda p: RGB.convert("CMYK").save(p),
    "sixteen_bit.png": lambda p: Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(p),
    "rgba.png": lambda p: RGB.convert("RGBA").save(p),
    "palette.png": lambda p: RGB.quantize(16).save(p),
    "grey.png": lambda p: RGB.convert("L").save(p),
    "bilevel.png": lambda p: RGB.convert("1").save(p),
    "animated.gif": lambda p: RGB.save(p, save_all=True, append_images=[RGB.transpose(Image.Transpose.ROTATE_180)]),
    "turned.jpg": exif,
    "one_pixel.png": lambda p: RGB.resize((1, 1)).save(p),
    "narrow.png": lambda p: RGB.resize((2000, 3)).save(p),
}

@pytest.mark.parametrize("name", READABLE)
def test_readable_pictures_work(name, tmp_path, capsys):
    path, mask, over, figure = (tmp_path / n for n in (name, "mask.png", "over.png", "fig.png"))
    READABLE[name](path)
    assert main(["segment", str(path), "--clusters", "2", "--out", str(mask), "--overlay", str(over)]) == 0
    size = (40, 60) if name == "turned.jpg" else Image.open(path).size
    assert Image.open(mask).size == Image.open(over).size == size
    assert main(["explain", str(path), "--at", "0,0", "--mode", "diagonal", "--out", str(figure)]) == 0
    assert np.asarray(Image.open(figure).convert("RGB")).std() > 1

def test_a_huge_picture_keeps_its_size(tmp_path, monkeypatch):
    "200 megapixels, flat so that writing it is quick; the mask has every pixel, a far point is inside"
    Image.new("RGB", (20000, 10000), "olive").save(tmp_path / "huge.png", compress_level=1)
    assert main(["segment", str(tmp_path / "huge.png"), "--clusters", "2", "--out", str(tmp_path / "mask.png")]) == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert Image.open(tmp_path / "mask.png").size == (20000, 10000)
    assert main(["explain", str(tmp_path / "huge.png"), "--at", "19999,9999", "--out", str(tmp_path / "fig.png")]) == 0
    assert main(["explain", str(tmp_path / "huge.png"), "--at", "20000,0", "--out", str(tmp_path / "out.png")]) == 1

def test_a_turned_photograph_is_the_upright_one(tmp_path):
    exif(tmp_path / "turned.jpg")
    RGB.save(tmp_path / "plain.jpg")
    Image.open(tmp_path / "plain.jpg").transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    for name in ("turned.jpg", "upright.png"):
        argv = ["segment", str(tmp_path / name), "--clusters", "3", "--out", str(tmp_path / f"{name}.mask.png")]
        assert main(argv) == 0
    masks = [np.asarray(Image.open(tmp_path / f"{n}.mask.png")) for n in ("turned.jpg", "upright.png")]
    assert (masks[0] == masks[1]).mean() > 0.98

class Evil:
    "Would leave a file behind if it were ever unpickled"
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder / "ran"),)

def weights(change):
    def make(path):
        state = load_file(asset("scenes_clip.safetensors"))
        change(state)
        save_file(state, path)
    return make

def truncated(path):
    whole = asset("scenes_clip.safetensors").read_bytes()
    path.write_bytes(whole[:len(whole) // 2])

BAD_WEIGHTS = {
    "nan": (weights(lambda s: s["visual.conv1.weight"].fill_(float("nan"))), "visual.conv1.weight"),
    "other_model": (weights(lambda s: [s.pop(k) for k in list(s) if "resblocks.5" in k]), "resblocks.5"),
    "truncated": (truncated, "fetch it again"),
    "code.pth": (lambda p: p.write_bytes(pickle.dumps(Evil(p.parent), protocol=2)), "convert it to safetensors"),
    "code.pt": (lambda p: torch.save({"a": Evil(p.parent)}, p), "convert it to safetensors"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "text": (lambda p: p.write_text("no weights at all"), "safetensors"),
}

@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_one_line(name, tmp_path, capsys):
    make, words = BAD_WEIGHTS[name]
    path = tmp_path / (name if "." in name else f"{name}.safetensors")
    make(path)
    assert main(["explain", "--model", "scenes_clip", "--weights", str(path), "--out", str(tmp_path / "fig.png")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and words in said[0] and said[0].startswith("ultra-nb: "), said
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

BAD_PICTURES = {
    "truncated.png": lambda p: p.write_bytes(Path(make_png(p)).read_bytes()[:400]),
    "text.jpg": lambda p: p.write_text("no picture"),
    "empty.png": lambda p: p.write_bytes(b""),
    "folder.png": lambda p: p.mkdir(),
    "missing.png": lambda p: None,
}

def make_png(path):
    RGB.save(path)
    return path

@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_one_line(name, tmp_path, capsys):
    BAD_PICTURES[name](tmp_path / name)
    assert main(["segment", str(tmp_path / name), "--out", str(tmp_path / "mask.png")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and name in said[0] and not (tmp_path / "mask.png").exists(), said

def test_a_projection_of_the_wrong_shape_or_name(tmp_path, capsys):
    save_file({"W": torch.ones(196, 192)}, tmp_path / "W.safetensors")
    save_file({"theta": torch.ones(197, 192)}, tmp_path / "theta.safetensors")
    save_file({"W": torch.ones(197, 192)}, tmp_path / "ones.safetensors")
    explain = ["explain", "--model", "scenes_clip"]
    weights, figures = {name: str(tmp_path / f"{name}.safetensors") for name in ("W", "theta", "ones")}, []
    for name, words in {"W": "[197, 192]", "theta": "not a projection W"}.items():
        assert main([*explain, "--scalar", weights[name], "--out", str(tmp_path / "fig.png")]) == 1
        assert words in capsys.readouterr().err
    for name, scalar in {"sum": "sum", "ones": weights["ones"]}.items():
        figure = tmp_path / f"{name}.png"
        assert main([*explain, "--token", "60", "--scalar", scalar, "--out", str(figure)]) == 0
        figures.append(np.asarray(Image.open(figure)).astype(int))
    same, ones = figures
    assert abs(same - ones).max() <= 2

@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_places_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["explain", "--out", str(tmp_path / "file" / "fig.png")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["explain", "--out", "/proc/no/fig.png"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["explain", "--token", "3", "--out", str(tmp_path / "fig.jpeg2k")]) == 1
    assert capsys.readouterr().err.strip() == f"ultra-nb: {tmp_path / 'fig.jpeg2k'} must end in .png or .pdf or .svg"

HELP = """import sys
import ultra_nb.cli as c
try: c.main(["--help"])
except SystemExit as stop: assert stop.code == 0
assert "torch" not in sys.modules
"""

def test_module_runs_and_help_is_light():
    assert subprocess.run([sys.executable, "-c", HELP], capture_output=True).returncode == 0
    argv = [sys.executable, "-m", "ultra_nb.cli", "explain", "--token", "-1"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1 and "outside the sequence" in done.stderr and "Traceback" not in done.stderr

def test_interrupt_has_its_own_exit_code(monkeypatch, capsys):
    def stop(path): raise KeyboardInterrupt
    monkeypatch.setattr("ultra_nb.cli._image_or_example", stop)
    assert main(["explain", "--out", "never.png"]) == 130
    assert "interrupted" in capsys.readouterr().err

WRONG = { # what is missing or wrong: the command's own usage, then one line
    "paint": "invalid choice: 'paint'",
    "explain --layer x": "invalid int value: 'x'",
    "explain --token": "expected one argument",
    "explain --colour red": "unrecognized arguments",
    "segment --mode fast": "invalid choice: 'fast'",
    "segment a.jpg b.jpg": "unrecognized arguments: b.jpg",
    "evaluate": "required: DATASET", "evaluate scenes --k 3 --threshold 0.4": "not allowed with",
    "perturb": "required: DATASET", "perturb scenes --share": "expected at least one argument",
    "itiou": "required: DATASET", "itiou scenes --tau x": "invalid float value: 'x'",
    "dashboard": "required: DATASET", "dashboard scenes --tau .2": "unrecognized arguments: --tau",
    "fit-w": "required: DATASET", "fit-w scenes --kind dust": "invalid choice: 'dust'",
    "data voc potsdam": "unrecognized arguments: potsdam", "data --root": "expected one argument",
    "summarize": "required: FILE", "summarize post.txt --scalar mean": "invalid choice: 'mean'",
    "train": "required: SETTINGS, --out", "train sft_llama2_7b": "required: --out",
    "reproduce table9": "'table9' is no table or figure of the paper",
    "reproduce --profile mine": "invalid choice: 'mine'",
    "reproduce --root DIR": "'DIR' has no name",
    "doctor who": "unrecognized arguments: who",
    "bench": "required: WHAT",
    "bench maps --repeats": "expected one argument",
    "bench gpu --device cpu --quick yes": "unrecognized arguments: yes",
    "bench maps a.jpg b.jpg": "unrecognized arguments: b.jpg",
    "bench evaluate": "required: DATASET",
    "bench precision photo_vit": "unrecognized arguments: photo_vit",
    "bench sizes 4097": "unrecognized arguments: 4097",
}

@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_get_usage_and_one_line(words, capsys):
    with pytest.raises(SystemExit) as stopped: main(words.split())
    said = capsys.readouterr()
    usage, *_, last = said.err.strip().splitlines()
    command = words.split()[0] if words != "paint" else ""
    assert stopped.value.code == 2 and said.out == "" and WRONG[words] in last, said.err
    assert usage.startswith(f"usage: ultra-nb {command}".rstrip()), said.err
    assert sum(not line.startswith(("usage:", " ")) for line in said.err.strip().splitlines()) == 1, said.err

def test_wrong_arguments_are_tried_for_every_command():
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert set(commands) <= {words.split()[0] for words in WRONG}

def test_a_reader_that_leaves_early_is_no_error():
    "As in: ultra-nb doctor | head -1"
    argv = [sys.executable, "-m", "ultra_nb.cli", "doctor"]
    env = os.environ | dict(PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout.readline().startswith(b"ok  python")
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141

def test_the_first_photograph_goes_as_the_readme_says(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)).save("photo.jpg")
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    said = readme.split("## From a clone to a photograph")[1].split("```")
    argv = next(line for line in said[1].splitlines() if "ultra-nb " in line).split("#")[0].split()[1:]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert f"{err.strip()}\n{out.strip()}" == said[3].strip()
