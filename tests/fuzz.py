"""Fuzzing with Hypothesis: odd arguments for every subcommand, and damaged files of every kind that is read.

`python tests/fuzz.py [--cases 2400] [--seed 0] [--jobs 2] [--only REGEX]` draws so many cases and runs each in a child,
in a folder of its own. Every one must end well: with a result whose numbers are finite, or with exit code 1 or 2, one
or two lines, and the folder as it was before. What is wrong is printed when it is first seen, and in the end by its
kind, each with the shortest case, which `python tests/fuzz.py --case CASE` tries again. Options come from the parser,
so that a new one needs no line here.
"""
import argparse, ast, json, math, multiprocessing, os, re, shutil, struct, sys, tempfile, time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from tqdm import tqdm
import child
from crash import contents

LIMIT = 15 # seconds; what takes longer must have said so
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
NO_MESSAGE = re.compile(r"ultra-nb: (\w*(Error|Exception|Warning)\b|[^ ]*$)") # the name of an exception, or one word
NO_NUMBER = re.compile(r"(?<=[ ([:])-?(nan|inf)\b(?![\w/.=])")
FIXED = dict(database=None, deadline=None, suppress_health_check=list(HealthCheck))

# --- what commands read: small folders, made once ---------------------------------------------------------------------

TEXT = "My brother wants to sell the house. Should I go?"
EVALUATE = "evaluate folder --root own --layer 2 --scalar sum"
SUMMARIZE = "summarize text --summary Sell --layer 2 --mode diagonal"
SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
FIT = "fit-w scenes --images 8 --layer 2 --k 2 --passes 1"

def own(folder):
    child.pictures(folder / "own", classes=("ground", "ball"))
    child.pictures(folder / "jpeg", ending=".jpg")

VOC = "VOCdevkit/VOC2012"
CITY = [f"{part}/val/ulm/ulm_000000_000000_{kind}.png"
        for part, kind in dict(leftImg8bit="leftImg8bit", gtFine="gtFine_labelIds").items()]
STUFF = ["images/val2017/0.jpg", "annotations/val2017/0.png"]
TILES = ["2_Ortho_RGB/top_potsdam_2_10_RGB.tif", "5_Labels_all/top_potsdam_2_10_label.tif"]

def voc(folder):
    child.pictures(folder / VOC, ending=".jpg")
    (folder / VOC / "images").rename(folder / VOC / "JPEGImages")
    (folder / VOC / "masks").rename(folder / VOC / "SegmentationClass")
    (listed := folder / VOC / "ImageSets/Segmentation").mkdir(parents=True)
    (listed / "val.txt").write_text("0\n1\n")

def potsdam(folder):
    import numpy as np
    from scipy.io import savemat
    (folder / "imgs").mkdir(), (folder / "gt").mkdir()
    savemat(folder / "imgs/0.mat", dict(img=np.full((200, 200, 4), 7, np.uint8)), do_compression=True)
    savemat(folder / "gt/0.mat", dict(gt=np.eye(200, dtype=np.int32)), do_compression=True)
    (folder / "labelled_test.txt").write_text("0\n")

def pair(folder, ending, values, **places):
    "A picture and its mask, each at its place"
    child.pictures(folder / "own", 1, values, size=(360, 360), ending=ending)
    for part, place in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        next((folder / "own" / part).iterdir()).rename(folder / place)
    shutil.rmtree(folder / "own")

def cityscapes(folder): pair(folder, ".png", (7, 26), images=CITY[0], masks=CITY[1])

def coco_stuff(folder): pair(folder, ".jpg", (120, 150), images=STUFF[0], masks=STUFF[1])

def tiles(folder):
    from PIL import Image
    for place in TILES:
        (folder / place).parent.mkdir()
        Image.new("RGB", (400, 400), "blue").save(folder / place)

def weights(folder):
    import torch
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTModel
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8), add_pooling_layer=False)
    for name in ("vit", "pickled"):
        model.save_pretrained(folder / name)
        colours = dict(image_mean=[.5, .5, .5], image_std=[.5, .5, .5])
        (folder / name / "preprocessor_config.json").write_text(json.dumps(colours))
    (folder / "pickled/model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pickled/pytorch_model.bin")
    learned = dict(provenance={}, history=dict(loss=[1.], angle=[0.]))
    save_file(dict(W=torch.ones(17, 16)), folder / "W.safetensors", dict(learned=json.dumps(learned)))

def language(folder):
    child.language_model(folder / "model", max_shard_size="50KB")
    (folder / "text").write_text(TEXT)
    (folder / "pairs.jsonl").write_text(json.dumps(dict(prompt=TEXT, chosen=" Sell it.", rejected=" Go.")) + "\n")
    (folder / "pairs.csv").write_text(f"prompt,chosen,rejected\n{TEXT}, Sell it., Go.\n")
    arguments = dict(max_steps=1, use_cpu=True, bf16=False, max_length=64)
    stage = dict(stage="sft", model="model", data="pairs.jsonl", arguments=arguments, lora=None)
    (folder / "settings.json").write_text(json.dumps(stage))

def evaluated(folder):
    own(folder)
    assert child.run(f"{EVALUATE} --out out", folder).code == 0

def half_evaluated(folder):
    evaluated(folder)
    os.rename(folder / "out/rows.jsonl", folder / "out/part-0.jsonl")
    for name in ("result.json", "record.json"): (folder / "out" / name).unlink()

def half_fitted(folder):
    from ultra_nb.self_consistency import Projection
    def killed(): Projection.save = lambda *args: os._exit(9)
    assert child.run(FIT, folder, before=killed).code == 9

def reproduced(folder): assert child.run("reproduce fig3", folder).code == 0

def everything(folder):
    "For the arguments"
    for make in (own, weights, language): shutil.copytree(folder.parent / make.__name__, folder, dirs_exist_ok=True)

@cache
def materials():
    "A folder of such folders, by the names of the functions that make them"
    child.warm()
    for name in ("peft", "trl"): import_module(name)
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for make in (own, voc, cityscapes, coco_stuff, potsdam, tiles, weights, language, evaluated, half_evaluated,
                 half_fitted, reproduced, everything):
        (home / make.__name__).mkdir()
        make(home / make.__name__)
    return home

# --- arguments --------------------------------------------------------------------------------------------------------

BASE = { # quick commands that work, to be spoiled
    "explain": "explain own/images/0.png --layer 2 --token 5",
    "segment": "segment own/images/0.png --layer 2 --clusters 2",
    "evaluate": f"{EVALUATE} --limit 2",
    "perturb": "perturb folder --root own --layer 2 --tokens 1 --limit 2",
    "itiou": "itiou folder --root own --layer 2 --limit 2",
    "dashboard": "dashboard folder --root own --layer 2 --limit 2",
    "fit-w": f"{FIT} --out new.safetensors",
    "data": "data folder --root own",
    "summarize": SUMMARIZE,
    "train": "train settings.json --out out",
    "reproduce": "reproduce fig3",
    "bench evaluate": "bench evaluate folder --root own --limit 1",
    "bench maps": "bench maps --repeats 1 --layer 2 --image-size 64",
}
SLOW = {"bench gpu", "bench precision", "bench sizes"} # minutes, even with small models; test_cli tries their arguments
NUMBERS = """0 1 2 3 5 -1 -0 +2 007 17 255 256 999 1e3 1e308 1e-320 nan -nan NaN inf -inf .5 5. 1.5 -0.1 1_0 0x10
    ٣ ² ½ 1,2 1e5,-3 nan,nan 32x64 0x0 -8 8x 1000000 9223372036854775808""".split() + ["9" * 5000, " 2 ", "2\n", "1 2"]
WORDS = """- -- -x --out --help = a=b =x x= voc=own . ./ own jpeg text vit model W.safetensors settings.json pairs.jsonl
    own/images/0.png own/masks/0.png vit/model.safetensors nowhere nowhere/x.png new.png new.PDF new.svg new.jpg
    new.html new.safetensors new.json new/deep/x.png text/x.png Bücher.png 日本.png %s%(x)s{0} * ~ None""".split()
WORDS += ["", " ", "a\nb", "e\u0301", "\u202ered.png", "\U0001f98a", "\x1b[31mred\x07", "\udcff.png"]
WORDS += ["x" * 300, "y" * 5000 + ".png"]

def tame(text):
    "An argument that the system could pass, and that names no place outside the folder"
    return text.replace("\0", "").replace("..", ".").lstrip("/").replace("=/", "=")

@cache
def commands() -> dict: # name to actions
    "Every subcommand of the parser with its options and arguments"
    from ultra_nb.cli import parser
    def walk(name, one):
        below = [a for a in one._actions if isinstance(a, argparse._SubParsersAction)]
        if not below: yield name, [a for a in one._actions if a.dest != "help"]
        for action in below:
            for more, sub in action.choices.items(): yield from walk(f"{name} {more}".strip(), sub)
    return dict(walk("", parser()))

def values(action):
    "What may be given to an option: words of its own help, numbers, files, and worse"
    known = [*map(str, action.choices or ()), *re.findall(r"[\w.]+", action.help or ""), str(action.default)]
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    usual = NUMBERS if action.type in (int, float) else known
    return st.one_of(text, *map(st.sampled_from, (usual, known, NUMBERS, WORDS))).map(tame)

@st.composite
def lines(draw):
    "A command line: one that works, with one to three things done to it"
    name = draw(st.sampled_from(sorted(commands().keys() - SLOW)))
    argv, actions = BASE.get(name, name).split(), commands()[name]
    options, start = [a for a in actions if a.option_strings], len(name.split())
    word = values(draw(st.sampled_from(actions))) if actions else st.sampled_from(WORDS).map(tame)
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["option"] * 5 + ["replace", "insert", "drop"]))
        if how == "option" and options: argv += option(draw, draw(st.sampled_from(options)))
        elif how == "drop": argv = argv[:(i := draw(st.integers(start, len(argv))))] + argv[i + 1:]
        else: argv[(i := draw(st.integers(start, len(argv)))):i + (how == "replace")] = [draw(word)]
    return "everything", tuple(argv)

def option(draw, action):
    "An option with its values, as one argument or several"
    flag = draw(st.sampled_from(action.option_strings))
    if action.nargs == 0: return [flag]
    given = draw(st.lists(values(action), min_size=1, max_size=3 if action.nargs else 1))
    return [f"{flag}={given[0]}"] if len(given) == 1 and draw(st.booleans()) else [flag, *given]

# --- damaged files ----------------------------------------------------------------------------------------------------

READ = [ # material, the command that reads it, the files
    ("own", "segment own/images/0.png --layer 2 --clusters 2", "own/images/0.png own/images/1.png"),
    ("own", "explain jpeg/images/0.jpg --layer 2 --token 5", "jpeg/images/0.jpg"),
    ("own", EVALUATE, "own/images/0.png own/masks/0.png own/classes.txt"),
    ("own", "data folder --root jpeg", "jpeg/images/0.jpg jpeg/masks/0.png"),
    ("voc", "perturb voc --root . --layer 2 --tokens 1", f"{VOC}/JPEGImages/0.jpg {VOC}/SegmentationClass/0.png"),
    ("voc", "data voc --root .", f"{VOC}/ImageSets/Segmentation/val.txt"),
    ("cityscapes", "data cityscapes --root .", " ".join(CITY)),
    ("cityscapes", "itiou cityscapes --root . --layer 2", " ".join(CITY)),
    ("coco_stuff", "data coco-stuff --root .", " ".join(STUFF)),
    ("coco_stuff", "itiou coco-stuff --root . --layer 2", " ".join(STUFF)),
    ("tiles", "data potsdam --root . --split all", " ".join(TILES)),
    ("tiles", "itiou potsdam --root . --split all --layer 2", " ".join(TILES)),
    ("potsdam", "data potsdam --root .", "imgs/0.mat gt/0.mat labelled_test.txt"),
    ("potsdam", "itiou potsdam --root . --layer 2", "imgs/0.mat gt/0.mat"),
    ("weights", "segment --model vit --layer 2 --clusters 2",
     "vit/model.safetensors vit/config.json vit/preprocessor_config.json"),
    ("weights", "segment --model pickled --layer 2 --clusters 2", "pickled/pytorch_model.bin"),
    ("weights", "explain --model vit --layer 3 --token 5 --scalar W.safetensors", "W.safetensors"),
    ("language", f"{SUMMARIZE} --model model", """model/config.json model/generation_config.json model/tokenizer.json
     model/tokenizer_config.json model/model.safetensors.index.json model/model-00001-of-00003.safetensors"""),
    ("language", SUMMARIZE, "text"),
    ("language", "train settings.json --out out", "settings.json pairs.jsonl"),
    ("language", "train settings.json --data pairs.csv --out out", "pairs.csv"),
    ("evaluated", f"{EVALUATE} --out out", "out/settings.json out/rows.jsonl out/result.json out/record.json"),
    ("half_evaluated", f"{EVALUATE} --out out", "out/settings.json out/part-0.jsonl"),
    ("half_fitted", FIT, "W.safetensors.run/checkpoint.safetensors W.safetensors.run/settings.json"),
    ("reproduced", "reproduce fig3", """report/reproduction.json report/problems.json report/records/fig3.json
     report/figures/figure3.png report/index.html"""),
]
OTHER = {
    "empty": b"", "zeros": bytes(5000), "text": b"Not what you think.\n", "binary": bytes(range(256)) * 9,
    "list": b"[1]\n", "number": b"1\n", "null": b"null\n", "string": b'"x"\n', "object": b"{}\n",
    "nested": b"[" * 100_000, "html": b"<!doctype html><p>404</p>\n", "utf-16": TEXT.encode("utf-16"),
    "png": b"\x89PNG\r\n\x1a\n", "zip": b"PK\x05\x06" + bytes(18), "gzip": b"\x1f\x8b\x08" + bytes(30),
    "huge header": struct.pack("<Q", 2**40) + b"{}", "negative header": struct.pack("<q", -1) + b"{}",
}
ODD = [None, True, -1, 0, 3, 10**30, 1.5, math.nan, math.inf, "", "x", "\x1b[31mred", "../nowhere", "y" * 3000,
       [], {}, [[1]], dict(a=1)]
PLACE = st.one_of(st.integers(0, 300), st.integers(-100, -1), st.floats(0, 1, exclude_max=True))
BITS = st.lists(st.tuples(PLACE, st.integers(0, 7)), min_size=1, max_size=3)
WAY = st.lists(st.integers(0, 50), min_size=1, max_size=5)
JSON = st.tuples(st.just("json"), WAY, st.integers(-1, len(ODD) - 1))
DAMAGE = st.one_of(
    JSON, JSON, st.tuples(st.just("cut"), PLACE), st.tuples(st.just("flip"), BITS),
    st.tuples(st.just("swap"), PLACE, PLACE, st.integers(1, 64)),
    st.tuples(st.just("other"), st.sampled_from([*OTHER, "folder", "loop", "gone"])))

@st.composite
def damages(draw):
    "A command, a file that it reads, and what happens to it"
    material, argv, files = draw(st.sampled_from(READ))
    return material, tuple(argv.split()), draw(st.sampled_from(files.split())), draw(DAMAGE)

def at(place, raw): return int(place * len(raw)) if isinstance(place, float) else place % max(len(raw), 1)

def flipped(raw, bits):
    raw = bytearray(raw)
    for place, bit in bits: raw[at(place, raw)] ^= 1 << bit
    return bytes(raw)

def swapped(raw, a, b, n):
    a, b = sorted((at(a, raw), at(b, raw)))
    n = min(n, b - a)
    return raw[:a] + raw[b:b + n] + raw[a + n:b] + raw[a:a + n] + raw[b + n:]

def spoiled(tree, way, value):
    "A tree of JSON with one of its values replaced, or taken out"
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = keys[way[0] % len(keys)]
    if len(way) > 1 and isinstance(tree[key], (dict, list)) and tree[key]: spoiled(tree[key], way[1:], value)
    elif value is NotImplemented: del tree[key]
    else: tree[key] = value
    return tree

def spoiled_json(path, raw, way, odd):
    "The JSON in a file: all of it, its first line, or the head of safetensors; text has none"
    start, end = 0, len(raw)
    if path.suffix == ".safetensors": start, end = 8, 8 + struct.unpack("<Q", raw[:8])[0]
    elif path.suffix == ".jsonl": end = raw.index(b"\n")
    elif path.suffix != ".json": return raw + b"\n" + json.dumps(ODD[odd]).encode()
    tree = spoiled(json.loads(raw[start:end]), way, ODD[odd] if odd >= 0 else NotImplemented)
    new = json.dumps(tree).encode()
    return (struct.pack("<Q", len(new)) if start else b"") + new + raw[end:]

def damage(path, how, *what):
    "Does it to the file"
    raw = path.read_bytes()
    path.unlink()
    if what == ("folder",): path.mkdir()
    elif what == ("loop",): path.symlink_to(path.name)
    elif how == "cut": path.write_bytes(raw[:at(what[0], raw)])
    elif how == "flip": path.write_bytes(flipped(raw, what[0]))
    elif how == "swap": path.write_bytes(swapped(raw, *what))
    elif how == "json": path.write_bytes(spoiled_json(path, raw, *what))
    elif what != ("gone",): path.write_bytes(OTHER[what[0]])

# --- the judge --------------------------------------------------------------------------------------------------------

def wrong(case) -> list: # of short texts
    "Runs a case and says what is wrong with its end"
    material, argv, *change = case
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        shutil.copytree(materials() / material, folder / "here")
        if change: damage(folder / "here" / change[0], *change[1])
        before = contents(folder)
        done = child.run(list(argv), folder / "here", before=child.limited, seconds=LIMIT)
        after = contents(folder)
        found = judged(done, argv, [n for n in after if before.get(n, 0) != after[n]], folder)
        return found + ["nothing is wrong with it, and it is refused"] * (done.code > 0 and case in undamaged())
    finally: shutil.rmtree(folder)

def judged(done, argv, new, folder):
    "What is wrong with an end"
    if done.code in child.TOO_LONG:
        told = done.out.strip() or [line for line in done.err.split("\n") if line and not line.startswith("Backbone(")]
        return [] if told else [f"not a word in {LIMIT} seconds"]
    if done.code not in (0, 1, 2): return [f"exit code {done.code}: {done.err[-200:]}"]
    found = [f"Traceback: {done.err.rstrip().splitlines()[-1]}"] if "Traceback" in done.err else []
    if CONTROL.search(re.sub(r"\r.*%\|.*", "", done.out + done.err)): found.append("control characters")
    return found + (refused(done, argv, new) if done.code else succeeded(done, new, folder))

def refused(done, argv, new):
    "What is wrong with exit code 1 or 2; a report stays, as it says what could not be made"
    found, longest = [], 1000 + sum(map(len, argv))
    listed = done.said and "(listed above)" in done.said[-1] # a line for each image before it
    if not listed and not 1 <= len(done.said) <= 2:
        found.append(f"{len(done.said)} lines: {done.said[:1]} .. {done.said[-1:]}")
    found += [f"a line of {len(line)} characters: {line[:100]}" for line in done.said if len(line) > longest]
    found += [f"no message: {line[:200]}" for line in done.said if NO_MESSAGE.match(line)]
    reported = argv[:1] == ("reproduce",) and "as they should be" in done.out
    return found + [f"left or changed: {', '.join(new)}"] * bool(new and not reported)

def succeeded(done, new, folder):
    "What is wrong with exit code 0: numbers that are none, files that cannot be opened"
    found = ["a number that is none"] * bool(NO_NUMBER.search(done.out))
    return found + [f"unsound: {n}: {why}" for n in new if (why := unsound(folder / n))]

def unsound(path):
    "Why a file is not what its name says; None where it is"
    from PIL import Image
    from safetensors.torch import load_file
    def strange(constant): raise ValueError(constant)
    try:
        if path.suffix.lower() in (".png", ".jpg", ".webp"): Image.open(path).load()
        elif path.suffix == ".json": json.loads(path.read_text(), parse_constant=strange)
        elif path.suffix == ".jsonl": [json.loads(line, parse_constant=strange) for line in path.open()]
        elif path.suffix == ".safetensors":
            if not all(tensor.isfinite().all() for tensor in load_file(path).values()): return "not finite"
        elif path.suffix.lower() in (".html", ".svg", ".pdf") and not path.stat().st_size: return "empty"
    except Exception as error: return f"{type(error).__name__} {error}"

# --- all of it --------------------------------------------------------------------------------------------------------

def undamaged():
    "The commands as they are"
    named = [("everything", argv) for argv in BASE.values()] + [(material, argv) for material, argv, _ in READ]
    return [(material, tuple(argv.split())) for material, argv in named]

def cases(): return st.one_of(lines(), damages())

def drawn(n:int, start:int=0) -> list:
    "So many cases"
    found = {}
    @seed(start)
    @settings(max_examples=n, phases=[Phase.generate], **FIXED)
    @given(cases())
    def note(case): found[ascii(case)] = case
    note()
    return list(found.values())

def kind(case, what):
    "What cases with the same defect have in common"
    command = next((name for name in commands() if " ".join(case[1]).startswith(name)), None)
    return command, *case[2:3], re.sub(r"\d+|'[^']*'|\"[^\"]*\"|/tmp/\S+|(?<=changed: ).*", "_", what)[:80]

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression for a case")
    parser.add_argument("--case", type=ast.literal_eval, help="one case, as printed")
    args, start, groups = parser.parse_args(), time.perf_counter(), defaultdict(list)
    materials()
    chosen = [args.case] if args.case else undamaged() + drawn(args.cases, args.seed)
    chosen = [case for case in chosen if re.search(args.only, ascii(case))]
    try:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
            for case, found in zip(tqdm(chosen, unit="case"), pool.map(wrong, chosen), strict=True):
                for what in found:
                    if kind(case, what) not in groups: print(ascii(what), ascii(case), flush=True)
                    groups[kind(case, what)].append((ascii(case), what))
    finally: shutil.rmtree(materials())
    print()
    for same in sorted(groups.values(), key=len, reverse=True):
        case, what = min(same, key=lambda found: len(found[0]))
        print(f"{len(same)} x {ascii(what)}\n    {case}")
    print(f"{len(chosen)} cases, {len(groups)} kinds of defects, in {(time.perf_counter() - start) / 60:.1f} minutes")
    return bool(groups)

if __name__ == "__main__": sys.exit(main())
