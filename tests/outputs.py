"Notebooks run top to bottom in a kernel of their own, and what they print and draw now beside what they have saved."
import html, io, os, re
from base64 import b64decode
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path
import nbformat
import numpy as np
from matplotlib.testing.compare import calculate_rms
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
FLAGS = re.search(r"^tst_flags = (.*)", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M)[1].split()
LEFT_OUT = re.compile(rf"^\s*#\|\s*({'|'.join(FLAGS)})\b|\bnbdev_export\(", re.M) # as nbdev_test leaves them out

def run(path, folder):
    "A notebook of the copy of nbs/ in `folder`; cells that were left out keep their outputs"
    place = folder / path.relative_to(ROOT)
    nb = nbformat.read(place, as_version=4)
    for cell in nb.cells:
        if LEFT_OUT.search(cell.source): cell.metadata.tags = ["left-out"]
    settings = dict(timeout=None, skip_cells_with_tag="left-out", resources=dict(metadata=dict(path=str(place.parent))))
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | dict(HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    return NotebookClient(nb, **settings).execute(env=env)

# Numbers agree within one in a thousand, or in all digits but the last; whole ones exactly, for they count something.
# Below NOISE they are rounding. Numbers with a unit of time or memory are the machine's and are not compared.
RELATIVE, NOISE = 1e-3, 1e-9
PLAIN = r"(?<![\w.])([-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?)"
NUMBER = re.compile(PLAIN + r"(\s?%)?(?!\w)")
MEASURED = re.compile(PLAIN + r"\s?((?:ms|s|seconds?|minutes?|hours?|[KMG]i?B)\b)")

def shown(cell):
    "The lines that a cell's outputs say; pictures, widgets and objects without text say none"
    printed = [out for out in cell.get("outputs", []) if out.output_type == "stream" and out.name == "stdout"]
    lines = "".join(out.text for out in printed).splitlines() # a kernel may part them anywhere
    for out in cell.get("outputs", []):
        data = out.get("data", {})
        if "text/html" in data: lines += html.unescape(re.sub(r"<[^>]*>", "", data["text/html"])).splitlines()
        elif not any(kind.startswith("image/") or "widget" in kind for kind in data):
            lines += data.get("text/markdown", data.get("text/plain", "")).splitlines()
    lines = (" ".join(re.sub(r"<[\w.]+ (object )?at 0x\w+>", "<object>", line).split()) for line in lines)
    return [line for line in lines if line]

def near(saved, new):
    "Whether two printed numbers agree"
    (a, share), (b, _) = saved, new
    a, b = (Decimal(n.replace(",", "")) for n in (a, b))
    if re.fullmatch(r"[-+\d,]+", saved[0]) and not share: return a == b
    last = Decimal(10)**max(a.as_tuple().exponent, b.as_tuple().exponent)
    return abs(a - b) <= max(Decimal(RELATIVE) * max(abs(a), abs(b)), last, Decimal(NOISE))

def same(saved, new):
    "Whether two lines say the same"
    if saved is None or new is None: return False
    saved, new = (MEASURED.sub(r"# \2", line) for line in (saved, new))
    if NUMBER.sub(r"#\2", saved) != NUMBER.sub(r"#\2", new): return False
    return all(map(near, NUMBER.findall(saved), NUMBER.findall(new)))

def pictures(cell):
    "The pictures among a cell's outputs, as pixels"
    found = [v for out in cell.get("outputs", []) for k, v in out.get("data", {}).items() if k.startswith("image/")]
    return [np.asarray(Image.open(io.BytesIO(b64decode(file))).convert("RGB"), np.int16) for file in found] # no wrap

def alike(saved, new, tolerance=2): # root mean square over pixels, of 255
    "Whether two pictures show the same"
    return saved is not None and new is not None and saved.shape == new.shape and calculate_rms(saved, new) <= tolerance

def stale(saved, new):
    "What cells that ran print or draw otherwise than they have saved, three lines each"
    found = []
    for i, (old, cell) in enumerate(zip(saved.cells, new.cells, strict=True)):
        if cell.cell_type != "code" or LEFT_OUT.search(cell.source): continue
        lines = [pair for pair in zip_longest(shown(old), shown(cell)) if not same(*pair)]
        drawn = [pair for pair in zip_longest(pictures(old), pictures(cell)) if not alike(*pair)]
        if lines or drawn: found.append(f"cell {i} ({cell.id}), {cell.source.splitlines()[0]!r}:")
        found += [f"  saved: {was}\n  now:   {now}" for was, now in lines[:3]]
        found += [f"  {len(drawn)} of its pictures show something else"] * bool(drawn)
    return found
