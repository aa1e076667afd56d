"The house: linters, types and layers are clean, cells are small, and a name means one thing."
import ast, json, re, subprocess, sys
from collections import defaultdict
from pathlib import Path
from statistics import median
import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(p for p in (ROOT / "ultra_nb").glob("*.py") if not p.stem.startswith("_"))

@pytest.mark.parametrize("tool", ["ruff check", "mypy", "lint-imports --no-cache"])
def test_a_linter_has_no_complaint(tool):
    name, *rest = tool.split()
    done = subprocess.run([Path(sys.executable).parent / name, *rest], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

def test_export_cells_hold_one_idea():
    cells = [c["source"] for p in (ROOT / "nbs").rglob("*.ipynb") for c in json.loads(p.read_text("utf-8"))["cells"]]
    exported = [lines for lines in cells if any(re.match(r"#\| *export", line) for line in lines)]
    sizes = sorted(sum(bool(line.strip()) for line in lines) for lines in exported)
    assert median(sizes) <= 10 and sizes[len(sizes) * 9 // 10] < 25 and sizes[-1] <= 60, sizes

def defined(path):
    "Names that a module defines at its top"
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef): yield node.name
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and n.id != "__all__")

def test_a_name_means_one_thing():
    homes = defaultdict(set)
    for path in MODULES:
        for name in defined(path): homes[name].add(path.stem)
    assert not {name: rooms for name, rooms in homes.items() if len(rooms) > 1}

def test_rooms_keep_their_private_names():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom): continue
            if not node.level and not (node.module or "").startswith("ultra_nb"): continue
            private = [a.name for a in node.names if re.match(r"_[a-z]", a.name)]
            assert not private, (path.stem, node.module, private)
