"""The package as a stranger installs it: built without a network, in an environment that holds what the core
requirements bring and nothing else."""
import configparser, hashlib, os, re, shutil, subprocess, sys, tarfile, venv, zipfile
from importlib.metadata import distribution
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from PIL import Image
from ultra_nb.scenes import scene
from ultra_nb.explanation_maps import explain
from ultra_nb.models import load

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links to the packages of this environment")
ROOT = Path(__file__).parent.parent
INI = configparser.ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini", encoding="utf-8")
INI = INI["DEFAULT"]
WHEEL = f"ultra_nb-{INI['version']}-py3-none-any.whl"
SHIPPED = {"__init__.py", "_modidx.py", "_quarto.yml"} # of the files with an underscore in front

def run(*argv, **options): return subprocess.run([str(a) for a in argv], capture_output=True, text=True, **options)

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the sdist, and the wheel built from the sdist; from a copy, so that nothing of an earlier build gets
    in"""
    copy, out = tmp_path_factory.mktemp("source") / "ultra_nb", tmp_path_factory.mktemp("dist")
    skipped = shutil.ignore_patterns(".*", "build", "dist", "_*", "*.egg-info", "*.pyc")
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: skipped(folder, names) - SHIPPED)
    argv = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy]
    done = run(*argv, env=os.environ | dict(PIP_NO_INDEX="1"))
    assert done.returncode == 0, done.stdout + done.stderr
    return out

@pytest.fixture(scope="module")
def wheel(built): return built / WHEEL

def test_wheel_and_sdist_hold_what_they_should(built):
    assert {p.name for p in built.iterdir()} == {WHEEL, f"ultra_nb-{INI['version']}.tar.gz"}
    modules = {f"ultra_nb/{p.name}" for p in (ROOT / "ultra_nb").glob("*.py")}
    modules |= {f"ultra_nb/{name}" for name in ("py.typed", "report.html", "page.html", "page.css", "explorer.html",
                                                "explorer.css", "explorer.js")}
    shipped = {f"ultra_nb/assets/{p.name}" for p in (ROOT / "data").iterdir()}
    with zipfile.ZipFile(built / WHEEL) as z:
        own = {n for n in z.namelist() if ".dist-info/" not in n}
        assert own == modules | shipped
        sums = z.read("ultra_nb/assets/SHA256SUMS").decode()
        for digest, name in map(str.split, sums.splitlines()):
            assert hashlib.sha256(z.read(f"ultra_nb/assets/{name}")).hexdigest() == digest
        points = z.read(f"ultra_nb-{INI['version']}.dist-info/entry_points.txt").decode()
        assert "ultra-nb = ultra_nb.cli:main" in points and "ultra_nb = ultra_nb._modidx:d" in points
    with tarfile.open(next(built.glob("*.tar.gz"))) as t: inside = {n.partition("/")[2] for n in t.getnames()}
    sources = {f"data/{p.name}" for p in (ROOT / "data").iterdir()}
    documents = {"settings.ini", "README.md", "LICENSE", "NOTICE", "pyproject.toml", "setup.py"}
    assert inside >= modules | sources | documents
    assert not [n for n in inside if re.match(r"nbs|figures|report|\.|.*\.(ipynb|pt|pth)$", n)]

def test_package_is_small(wheel):
    "Embedded models come with it, so that the first picture needs no network; they may not grow without being noticed"
    assert wheel.stat().st_size < 25e6

def closure(requirements):
    "Installed distributions that these requirements bring, markers and extras heeded"
    found, waiting = {}, [Requirement(r) for r in requirements]
    while waiting:
        r = waiting.pop()
        wanted = found.setdefault(re.sub(r"[-_.]+", "-", r.name).lower(), set())
        new = ({""} | r.extras) - wanted
        wanted |= new
        for line in distribution(r.name).requires or []:
            below = Requirement(line)
            holds = below.marker.evaluate if below.marker else lambda environment: True
            if any(holds(dict(extra=extra)) for extra in new): waiting.append(below)
    return set(found)

@pytest.fixture(scope="module")
def home(wheel, tmp_path_factory):
    """An environment with the wheel, and with links to those packages of this environment that the core requirements
    bring. Downloading them again would take gigabytes and a network; a path to the whole environment would hide a
    requirement that is missing in settings.ini"""
    home = tmp_path_factory.mktemp("stranger") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python"]
    done = run(*pip, "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    site, = home.glob("lib/python*/site-packages")
    for name in closure(INI["requirements"].split()):
        package = distribution(name)
        for top in {Path(file).parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists(): (site / top).symlink_to(package.locate_file(top))
    return home

def inside(home, code, cwd):
    env = dict(PATH=os.environ["PATH"], HOME=str(cwd), HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    return run(home / "bin" / "python", "-I", "-c", code, cwd=cwd, env=env)

IMPORTS = """
import sys
opened = []
def seen(event, args):
    weights = event == "open" and str(args[0]).endswith(".safetensors")
    if event == "socket.connect" or weights: opened.append((event, args))
sys.addaudithook(seen)
import ultra_nb
assert ultra_nb.__file__.startswith(sys.prefix), ultra_nb.__file__
assert {m for m in sys.modules if m.partition('.')[0] == 'ultra_nb'} == {'ultra_nb'}
assert 'torch' not in sys.modules and 'numpy' not in sys.modules
import torch
before = set(sys.modules)
import ultra_nb.explanation_maps, ultra_nb.models
new = set(sys.modules) - before
print(len(new), sorted({m.partition('.')[0] for m in new} - set(sys.stdlib_module_names)))
from importlib import import_module
for name in NAMES: import_module(f"ultra_nb.{name}")
assert not opened, opened
assert not torch.cuda.is_initialized()
"""

def test_imports_need_only_core_requirements(home, tmp_path):
    """and touch no GPU, weights or network; `import ultra_nb` brings in nothing at all, the modules for explaining
    little beside torch"""
    names = [p.stem for p in (ROOT / "ultra_nb").glob("[!_]*.py")]
    done = inside(home, f"NAMES = {names}{IMPORTS}", tmp_path)
    assert done.returncode == 0, done.stderr
    heavy = {"timm", "open_clip", "transformers", "torchvision", "matplotlib", "pandas", "sklearn", "scipy", "trl",
             "ipywidgets"}
    assert not heavy & set(re.findall(r"\w+", done.stdout)), done.stdout

USE = """
import torch
from PIL import Image
from ultra_nb.posts import read_pairs
from ultra_nb.scenes import scene
from ultra_nb.weights import check_assets
from ultra_nb.explanation_maps import explain
from ultra_nb.explorer import explore
from ultra_nb.images import photograph
from ultra_nb.models import load
from ultra_nb.summarization import summary_test, train_dpo, train_sft
assert not check_assets()
backbone, picture = load("scenes_clip"), Image.fromarray(scene(7).image)
maps = explain(backbone, backbone.inputs(picture), mode="diagonal")
print(maps.double().square().sum().item())
calls = [("notebook", lambda: explore(backbone, picture)),
         ("llm", lambda: train_sft(None, None, [], "out")),
         ("llm", lambda: train_dpo(torch.nn.Linear(1, 1), None, [], "out")),
         ("llm", lambda: read_pairs("some/data")),
         ("llm", lambda: summary_test(None, None, [])),
         ("photographs", lambda: photograph("astronaut"))]
for extra, call in calls:
    try: call()
    except ImportError as error: print(f"pip install 'ultra_nb[{extra}]'" in str(error), error)
"""

def test_embedded_model_explains_from_the_wheel(home, tmp_path):
    "and what needs a package of an extra says so in one line"
    done = inside(home, USE, tmp_path)
    assert done.returncode == 0, done.stderr
    total, *said = done.stdout.strip().splitlines()
    backbone = load("scenes_clip")
    maps = explain(backbone, backbone.inputs(Image.fromarray(scene(7).image)), mode="diagonal")
    assert float(total) == pytest.approx(maps.double().square().sum().item(), rel=1e-4)
    assert len(said) == 6 and all(line.startswith("True ") for line in said), done.stdout

def test_command_line(home, tmp_path):
    env = dict(PATH=os.environ["PATH"], HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    helped = run(home / "bin" / "ultra-nb", "--help", cwd=tmp_path, env=env)
    assert helped.returncode == 0 and "explain" in helped.stdout
    told = run(home / "bin" / "ultra-nb", "doctor", cwd=tmp_path, env=env)
    assert told.returncode == 0 and "all as SHA256SUMS says" in told.stdout, told.stdout + told.stderr
    assert "missing: pip install 'ultra_nb[llm]'" in told.stdout, told.stdout + told.stderr
    assert not re.search(r"missing: pip install 'ultra_nb\[core\]'", told.stdout)
