"""Fuzzing with Hypothesis: odd arguments for every subcommand, and damaged files of every kind that is read.

`python tests/fuzz.py [--cases 2400] [--seed 0] [--jobs 2] [--only REGEX]` draws so many cases and runs each in a child,
in a folder of its own. Every one must end well: with a result whose numbers are finite, or with exit code 1 or 2, one or
two lines, and the folder as it was before. What is wrong is printed by its kind, each with the shortest case, which
`python tests/fuzz.py --case CASE` tries again. Options come from the parser: a new one is fuzzed without being named here.
"""
import argparse, ast, contextlib, json, math, multiprocessing, os, re, shutil, signal, struct, sys, tempfile, time
from collections import defaultdict
from functools import cache, partial
from pathlib import Path
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
import child
from crash import contents

LIMIT = 10 # seconds; what takes longer must have said so
FIXED = dict(database=None, deadline=None, suppress_health_check=list(HealthCheck))

# --- what commands read: small folders, made once -----------------------------------------------------------------------

TEXT = "My brother wants to sell the house. Should I go?"
EVALUATE = "evaluate folder --root own --layer 2 --scalar sum"
FIT = "fit-w scenes --images 8 --layer 2 --k 2 --passes 1"

def own(folder):
    child.pictures(folder / "own", classes=("ground", "ball"))
    child.pictures(folder / "jpeg", ending=".jpg")

def voc(folder):
    child.pictures(folder / "VOCdevkit/VOC2012", ending=".jpg")
    os.rename(folder / "VOCdevkit/VOC2012/images", folder / "VOCdevkit/VOC2012/JPEGImages")
    os.rename(folder / "VOCdevkit/VOC2012/masks", folder / "VOCdevkit/VOC2012/SegmentationClass")
    (listed := folder / "VOCdevkit/VOC2012/ImageSets/Segmentation").mkdir(parents=True)
    (listed / "val.txt").write_text("0\n1\n")

def potsdam(folder):
    import numpy as np
    from scipy.io import savemat
    (folder / "imgs").mkdir(), (folder / "gt").mkdir()
    savemat(folder / "imgs/0.mat", dict(img=np.full((200, 200, 4), 7, np.uint8)), do_compression=True)
    savemat(folder / "gt/0.mat", dict(gt=np.eye(200, dtype=np.int32)), do_compression=True)
    (folder / "labelled_test.txt").write_text("0\n")

def weights(folder):
    import torch
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTModel
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
    for name in ("vit", "pickled"): model.save_pretrained(folder / name)
    (folder / "vit/preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    (folder / "pickled/model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pickled/pytorch_model.bin")
    learned = dict(provenance={}, history=dict(loss=[1.], angle=[0.]))
    save_file(dict(W=torch.ones(17, 16)), folder / "W.safetensors", dict(learned=json.dumps(learned)))

def language(folder):
    import torch, transformers
    from ultra_nb.models import embedded
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=512))
    model.save_pretrained(folder / "model", max_shard_size="50KB")
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_file=str(embedded("tldr_tokenizer.json")), **special)
    tokens.save_pretrained(folder / "model")
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
    import peft, trl
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for make in (own, voc, potsdam, weights, language, evaluated, half_evaluated, half_fitted, reproduced, everything):
        (home / make.__name__).mkdir()
        make(home / make.__name__)
    return home

# --- arguments --------------------------------------------------------------------------------------------------------

BASE = { # quick commands that work, to be spoiled
    "explain": "explain own/images/0.png --layer 2 --token 5", "segment": "segment own/images/0.png --layer 2 --clusters 2",
    "evaluate": f"{EVALUATE} --limit 2", "perturb": "perturb folder --root own --layer 2 --tokens 1 --limit 2",
    "itiou": "itiou folder --root own --layer 2 --limit 2", "fit-w": FIT, "data": "data folder --root own",
    "summarize": "summarize text --summary Sell --layer 2 --mode diagonal", "train": "train settings.json --out out",
    "reproduce": "reproduce fig3", "bench maps": "bench maps --repeats 1 --layer 2 --image-size 64",
}
NUMBERS = ("0 1 2 3 5 -1 -0 +2 007 17 255 256 999 1e3 1e308 1e-320 nan -nan NaN inf -inf .5 5. 1.5 -0.1 1_0 0x10 ٣ ² ½ 1,2 1e5,-3 nan,nan "
           "32x64 0x0 -8 8x 1000000 9223372036854775808").split() + ["9" * 5000, " 2 ", "2\n", "1 2"]
WORDS = ["", " ", "-", "--", "-x", "--out", "--help", "=", "a=b", "=x", "x=", "voc=own", ".", "./", "own", "jpeg", "text", "vit", "model",
         "W.safetensors", "settings.json", "pairs.jsonl", "own/images/0.png", "own/masks/0.png", "vit/model.safetensors", "nowhere", "nowhere/x.png",
         "new.png", "new.PDF", "new.svg", "new.jpg", "new.html", "new.safetensors", "new.json", "new/deep/x.png", "text/x.png", "Bücher.png", "日本.png",
         "e\u0301", "\u202ered.png", "\U0001f98a", "\x1b[31mred\x07", "\udcff", "\udcff.png", "a\nb", "%s%(x)s{0}", "*", "~", "None", "x" * 300, "y" * 5000 + ".png"]

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
    return st.one_of(st.sampled_from(usual), st.sampled_from(known), st.sampled_from(NUMBERS), st.sampled_from(WORDS), text).map(tame)

@st.composite
def lines(draw):
    "A command line: one that works, with one to three things done to it"
    name = draw(st.sampled_from(sorted(commands())))
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

SUMMARIZE = "summarize text --summary Sell --layer 2 --mode diagonal"
READ = [ # material, its files, the command that reads them
    ("own", "own/images/0.png own/images/1.png", "segment own/images/0.png --layer 2 --clusters 2"),
    ("own", "jpeg/images/0.jpg", "explain jpeg/images/0.jpg --layer 2 --token 5"),
    ("own", "own/images/0.png own/masks/0.png own/classes.txt", EVALUATE),
    ("own", "jpeg/images/0.jpg jpeg/masks/0.png", "data folder --root jpeg"),
    ("voc", *["VOCdevkit/VOC2012/" + " VOCdevkit/VOC2012/".join(["ImageSets/Segmentation/val.txt", "JPEGImages/0.jpg", "SegmentationClass/0.png"])],
     "perturb voc --root . --layer 2 --tokens 1"),
    ("potsdam", "imgs/0.mat gt/0.mat labelled_test.txt", "data potsdam --root ."),
    ("potsdam", "imgs/0.mat gt/0.mat", "itiou potsdam --root . --layer 2"),
    ("weights", "vit/model.safetensors vit/config.json vit/preprocessor_config.json", "segment --model vit --layer 2 --clusters 2"),
    ("weights", "pickled/pytorch_model.bin", "segment --model pickled --layer 2 --clusters 2"),
    ("weights", "W.safetensors", "explain --model vit --layer 3 --token 5 --scalar W.safetensors"),
    ("language", "model/config.json model/tokenizer.json model/tokenizer_config.json model/generation_config.json "
     "model/model.safetensors.index.json model/model-00001-of-00003.safetensors", f"{SUMMARIZE} --model model"),
    ("language", "text", SUMMARIZE),
    ("language", "settings.json pairs.jsonl", "train settings.json --out out"),
    ("language", "pairs.csv", "train settings.json --data pairs.csv --out out"),
    ("evaluated", "out/settings.json out/rows.jsonl out/result.json out/record.json", f"{EVALUATE} --out out"),
    ("half_evaluated", "out/settings.json out/part-0.jsonl", f"{EVALUATE} --out out"),
    ("half_fitted", "W.safetensors.run/checkpoint.safetensors W.safetensors.run/settings.json", FIT),
    ("reproduced", "report/reproduction.json report/problems.json report/records/fig3.json report/figures/figure3.png report/index.html",
     "reproduce fig3"),
]
OTHER = {"empty": b"", "zeros": bytes(5000), "text": b"Not what you think.\n", "binary": bytes(range(256)) * 9, "list": b"[1]\n", "number": b"1\n",
         "null": b"null\n", "string": b'"x"\n', "object": b"{}\n", "nested": b"[" * 100_000, "html": b"<!doctype html><p>404</p>\n",
         "zip": b"PK\x05\x06" + bytes(18), "png": b"\x89PNG\r\n\x1a\n", "utf-16": TEXT.encode("utf-16"), "gzip": b"\x1f\x8b\x08" + bytes(30),
         "huge header": struct.pack("<Q", 2**40) + b"{}", "minus": struct.pack("<q", -1) + b"{}"}
ODD = [None, True, -1, 0, 3, 10**30, 1.5, math.nan, math.inf, "", "x", "\x1b[31mred", "../nowhere", "y" * 3000, [], {}, [[1]], dict(a=1)]
PLACE = st.one_of(st.integers(0, 300), st.integers(-100, -1), st.floats(0, 1, exclude_max=True))
DAMAGE = st.one_of(
    st.tuples(st.just("cut"), PLACE), st.tuples(st.just("flip"), st.lists(st.tuples(PLACE, st.integers(0, 7)), min_size=1, max_size=3)),
    st.tuples(st.just("swap"), PLACE, PLACE, st.integers(1, 64)), st.tuples(st.just("other"), st.sampled_from([*OTHER, "folder", "loop", "gone"])),
    *[st.tuples(st.just("json"), st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(-1, len(ODD) - 1))] * 2)

@st.composite
def damages(draw):
    "A command, a file that it reads, and what happens to it"
    material, files, argv = draw(st.sampled_from(READ))
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
        return judged(done, folder, before, argv[0] if argv else "")
    finally: shutil.rmtree(folder)

def judged(done, folder, before, command):
    "What is wrong with an end"
    told = done.out.strip() or [line for line in done.err.split("\n") if line and not line.startswith("Backbone(")]
    if done.code == -signal.SIGALRM: return [] if told else [f"not a word in {LIMIT} seconds"]
    if done.code not in (0, 1, 2): return [f"exit code {done.code}: {done.err[-200:]}"]
    found = [f"Traceback: {done.err.rstrip().splitlines()[-1]}"] if "Traceback" in done.err else []
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", re.sub(r"\r.*%\|.*", "", done.out + done.err)): found.append("control characters")
    return found + (refused(done, folder, before, command) if done.code else succeeded(done, folder, before))

def refused(done, folder, before, command):
    "What is wrong with exit code 1 or 2; a report stays, as it says what could not be made"
    found = []
    if not 1 <= len(done.said) <= 2: found.append(f"{len(done.said)} lines: {done.said[:1]} .. {done.said[-1:]}")
    if any(len(line) > 1000 for line in done.said): found.append(f"a line of {max(map(len, done.said))} characters: {done.said[-1][:100]}")
    found += [f"no message: {line[:200]}" for line in done.said if re.match(r"ultra-nb: (\w*(Error|Exception|Warning)\b|[^ ]*$)", line)]
    after = {} if command == "reproduce" and "as they should be" in done.out else contents(folder)
    return found + [f"{'left' if n not in before else 'changed'}: {n}" for n in after if before.get(n, 0) != after[n]]

def succeeded(done, folder, before):
    "What is wrong with exit code 0: numbers that are none, files that cannot be opened"
    new = [folder / n for n, content in contents(folder).items() if content is not None and before.get(n, 0) != content]
    return ["a number that is none"] * bool(re.search(r"(?<![\w/.])-?(nan|inf)(?![\w/.=])", done.out)) + [f"unsound: {p.name}: {e}" for p in new if (e := unsound(p))]

def unsound(path):
    "Why a file is not what its name says; None where it is"
    from PIL import Image
    from safetensors.torch import load_file
    def strange(constant): raise ValueError(constant)
    try:
        if path.suffix.lower() in (".png", ".jpg", ".webp"): Image.open(path).load()
        elif path.suffix in (".json", ".jsonl"):
            for text in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines(): json.loads(text, parse_constant=strange)
        elif path.suffix == ".safetensors" and not all(t.isfinite().all() for t in load_file(path).values()): return "not finite"
        elif path.suffix.lower() in (".html", ".svg", ".pdf") and not path.stat().st_size: return "empty"
    except Exception as error: return f"{type(error).__name__} {error}"

# --- all of it --------------------------------------------------------------------------------------------------------

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
    return " ".join(BASE.get(case[1][0], "").split()[:1] or case[1][:1]), *case[2:3], re.sub(r"\d+|'[^']*'|\"[^\"]*\"|/tmp/\S+", "_", what)[:80]

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression for a case")
    parser.add_argument("--case", type=ast.literal_eval, help="one case, as printed")
    args, begin, groups = parser.parse_args(), time.perf_counter(), defaultdict(list)
    materials()
    chosen = [args.case] if args.case else [c for c in drawn(args.cases, args.seed) if re.search(args.only, ascii(c))]
    try:
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            for case, found in zip(chosen, pool.imap(wrong, chosen)):
                for what in found: groups[kind(case, what)].append((ascii(case), what))
    finally: shutil.rmtree(materials())
    for same in sorted(groups.values(), key=len, reverse=True):
        case, what = min(same, key=lambda found: len(found[0]))
        print(f"{len(same)} x {ascii(what)}\n    {case}")
    print(f"{len(chosen)} cases, {len(groups)} kinds of defects, in {(time.perf_counter() - begin) / 60:.1f} minutes")
    return bool(groups)

if __name__ == "__main__": sys.exit(main())
