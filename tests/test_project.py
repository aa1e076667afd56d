"The project as a whole: notebooks, library, README and shipped files agree."
import ast, configparser, hashlib, json, os, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BIN = Path(sys.executable).parent

def run(*argv, **kwargs): return subprocess.run([str(a) for a in argv], cwd=ROOT, capture_output=True, text=True, **kwargs)

def cells(path): return json.loads(path.read_text())["cells"]

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    "Top to bottom in a fresh process, without the cells that settings.ini's flags skip"
    done = run(BIN / "nbdev_test", "--path", path, "--n_workers", 0, env={**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stdout + done.stderr

def snapshot(folder): return {p: p.read_bytes() for p in sorted((ROOT / folder).rglob("*")) if p.suffix in (".py", ".ipynb")}

def test_library_is_exported_from_the_notebooks():
    before = snapshot("ultra_nb")
    assert run(BIN / "nbdev_export").returncode == 0
    assert snapshot("ultra_nb") == before, "run nbdev_export and commit ultra_nb/"

def test_notebooks_are_clean():
    before = snapshot("nbs")
    assert run(BIN / "nbdev_clean").returncode == 0
    assert snapshot("nbs") == before, "run nbdev_clean and commit nbs/"

def test_readme_is_rendered_from_the_index(tmp_path):
    assert run("make", "-s", "readme", f"BIN={BIN}", f"README={tmp_path / 'README.md'}").returncode == 0
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run make readme and commit README.md"

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_publishable(path):
    text = path.read_text()
    assert not re.search(r'"output_type": "error"|widget-view|/home/|/root/|/work/|/tmp/|[A-Z]:\\\\', text)
    assert len(text) < 1_500_000, "saved outputs are part of the documentation: keep them small"

def test_import_cells_are_light():
    "Importing every module brings in no model library, no GPU and no network"
    modules = sorted(p.stem for p in (ROOT / "ultra_nb").glob("*.py") if not p.stem.startswith("_"))
    code = f"import sys, importlib, torch\nfor m in {modules}: importlib.import_module('ultra_nb.' + m)\n" \
           "heavy = {'timm', 'open_clip', 'transformers', 'nbdev', 'fastcore', 'execnb'} & set(sys.modules)\nassert not heavy, heavy\nassert not torch.cuda.is_initialized()"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr

def test_run_time_needs_no_development_package():
    for path in (ROOT / "ultra_nb").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"nbdev", "fastcore", "execnb", "IPython"} & {n.split(".")[0] for n in names}, (path.name, names)

ALLOWED = dict(preliminaries="", models="", data="", records="", figures="", explanation_maps="preliminaries models", segmentation="explanation_maps",
               self_consistency="explanation_maps segmentation records", interpretability_metrics="explanation_maps models preliminaries records", evaluation="data models explanation_maps segmentation records",
               summarization="explanation_maps models data records figures",
               explorer="*", reproduction="*", cli="*")

def test_modules_import_only_what_the_design_allows():
    for path in (ROOT / "ultra_nb").glob("*.py"):
        if path.stem.startswith("_"): continue
        used = {n.module.split(".")[-1] for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module and (n.level or n.module.startswith("ultra_nb."))}
        assert ALLOWED[path.stem] == "*" or used <= set(ALLOWED[path.stem].split()), (path.stem, used)

def test_lock_pins_every_requirement_and_names_no_index():
    lock = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?:|file:|--index|--find-links", lock)
    lines = [line for line in lock.splitlines() if not line.startswith("#")]
    assert all(re.match(r"[A-Za-z0-9._-]+==", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    wanted = {re.sub(r"[-_.]+", "-", re.split(r"[<>=]", r)[0]).lower() for k, v in ini["DEFAULT"].items() if k.endswith("requirements") for r in v.split()}
    assert wanted <= pinned, wanted - pinned

def test_shipped_files_match_their_checksums():
    sums = dict(reversed(line.split(maxsplit=1)) for line in (ROOT / "data" / "SHA256SUMS").read_text().splitlines())
    shipped = {p.name: p for p in (ROOT / "data").iterdir() if p.name != "SHA256SUMS"}
    assert set(sums) == set(shipped)
    for name, path in shipped.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[name], name
        assert path.stat().st_size <= 12 * 2**20, name
