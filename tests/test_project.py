"The project as a whole: notebooks, library, README and shipped files agree."
import ast, configparser, hashlib, io, re, shutil, subprocess, sys
from base64 import b64encode
from pathlib import Path
import nbformat, pytest
from PIL import Image
from outputs import run as run_notebook, same, stale

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BIN = Path(sys.executable).parent

def run(*argv, cwd=ROOT): return subprocess.run([str(a) for a in argv], cwd=cwd, capture_output=True, text=True)

@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    "A copy of what notebooks and nbdev write to: tests leave the project as it is and do not disturb each other"
    copy = tmp_path_factory.mktemp("copy")
    for part in ("nbs", "ultra_nb", "figures"): shutil.copytree(ROOT / part, copy / part)
    for file in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / file, copy)
    return copy

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_its_outputs_are_current(path, copy):
    "Top to bottom in a fresh kernel; cells that settings.ini's flags leave out do not run and are not compared"
    old = stale(nbformat.read(path, as_version=4), run_notebook(path, copy))
    assert not old, "\n".join([f"{path.name}: run it again and save it, or look why", *old])

def test_what_makes_an_output_stale():
    "The gate itself: what it lets through and what it does not"
    def notebook(*lines, grey=0, source="x"):
        Image.new("L", (4, 4), grey).save(png := io.BytesIO(), "PNG")
        drawn = nbformat.v4.new_output("display_data", {"image/png": b64encode(png.getvalue()).decode()})
        said = [nbformat.v4.new_output("stream", name="stdout", text="\n".join(lines)), drawn]
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, outputs=said, id="a1")])
    passes = {"a 12.34": "a 12.35", "1,234.5": "1,234.9", "89 %": "90 %", "at most 4e-15": "at most 2e-16",
              "maps 0.5 s, 5 clusters": "maps 1.9 s, 5 clusters", "peak 1.30 MB": "peak 1.4 MB"}
    does_not = {"a 12.34": "a 12.36", "8 images": "9 images", "1,234": "1,235", "89 %": "91 %", "-0.3": "0.3",
                "a 1": "b 1", "0.5 s, 5 clusters": "0.5 s, 6 clusters", "sha256 99c5": "sha256 99c6", "a": None}
    assert all(same(*pair) for pair in passes.items()) and not any(same(*pair) for pair in does_not.items())
    assert stale(notebook("a", "b 1"), notebook("a", "b 2")) == ["cell 0 (a1), 'x':", "  saved: b 1\n  now:   b 2"]
    parted = notebook("a b")
    parted.cells[0].outputs[:1] = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in ("a ", "b")]
    assert stale(notebook("a b"), parted) == []
    assert stale(notebook(), notebook(grey=9)) == ["cell 0 (a1), 'x':", "  1 of its pictures show something else"]
    assert stale(notebook("a", source="#| slow\nx"), notebook("b", source="#| slow\nx")) == []

def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".py", ".ipynb")}

def test_library_is_exported_from_the_notebooks(copy):
    assert run(BIN / "nbdev_export", cwd=copy).returncode == 0
    assert files(copy / "ultra_nb") == files(ROOT / "ultra_nb"), "run nbdev_export and commit ultra_nb/"

def test_notebooks_are_clean(copy):
    assert run(BIN / "nbdev_clean", cwd=copy).returncode == 0
    assert files(copy / "nbs") == files(ROOT / "nbs"), "run nbdev_clean and commit nbs/"

def test_readme_is_rendered_from_the_index(tmp_path):
    assert run("make", "-s", "readme", f"BIN={BIN}", f"README={tmp_path / 'README.md'}").returncode == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme == (ROOT / "README.md").read_text(), "run make readme and commit README.md"

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_publishable(path):
    text = path.read_text()
    assert not re.search(r'"output_type": "error"|widget-view|/home/|/root/|/work/|/tmp/|[A-Z]:\\\\', text)
    assert len(text) < 1_500_000, "saved outputs are part of the documentation: keep them small"

LIGHT = """
import importlib, sys, torch
for name in {names}: importlib.import_module("ultra_nb." + name)
heavy = {{"timm", "open_clip", "transformers", "nbdev", "fastcore", "execnb"}} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""

def test_import_cells_are_light():
    "Importing every module brings in no model library, no GPU and no network"
    names = sorted(p.stem for p in (ROOT / "ultra_nb").glob("*.py") if not p.stem.startswith("_"))
    done = run(sys.executable, "-c", LIGHT.format(names=names))
    assert done.returncode == 0, done.stderr

def imported(path):
    "Names of the modules that a file imports, dots of relative ones left out"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom): yield node.module or ""

def test_run_time_needs_no_development_package():
    for path in (ROOT / "ultra_nb").glob("*.py"):
        found = {"nbdev", "fastcore", "execnb", "IPython"} & {name.split(".")[0] for name in imported(path)}
        assert not found, (path.name, found)

def test_lock_pins_every_requirement_and_names_no_index():
    name = lambda requirement: re.sub(r"[-_.]+", "-", re.split(r"[<>=]", requirement)[0]).lower()
    lock = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?:|file:|--index|--find-links", lock)
    lines = [line for line in lock.splitlines() if not line.startswith("#")]
    assert all(re.match(r"[A-Za-z0-9._-]+==", line) for line in lines)
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    required = [r for key, value in ini["DEFAULT"].items() if key.endswith("requirements") for r in value.split()]
    wanted, pinned = {name(r) for r in required}, {name(line) for line in lines}
    assert wanted <= pinned, wanted - pinned

def test_shipped_files_match_their_checksums():
    sums = dict(reversed(line.split(maxsplit=1)) for line in (ROOT / "data" / "SHA256SUMS").read_text().splitlines())
    shipped = {p.name: p for p in (ROOT / "data").iterdir() if p.name != "SHA256SUMS"}
    assert set(sums) == set(shipped)
    for name, path in shipped.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[name], name
        assert path.stat().st_size <= 12 * 2**20, name
