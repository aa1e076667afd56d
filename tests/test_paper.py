"Every numbered equation, table and figure of the paper has exactly one home here."
import importlib, json, re
from pathlib import Path
import pytest
from ultra_nb.entries import ENTRIES, paper_table

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))

EQUATIONS = { # number: what it says, the notebook that is its home, what computes it
    1: ("contribution of a block to a class logit", "00_preliminaries", "preliminaries.contribution"),
    2: ("product over the blocks", "00_preliminaries", "preliminaries.class_map"),
    3: ("explanation of a class logit", "00_preliminaries", "preliminaries.class_map"),
    4: ("contribution of a block to a latent token", "01_explanation_maps", "explanation_maps.explain"),
    5: ("product over the blocks below a layer", "01_explanation_maps", "explanation_maps.explain"),
    6: ("explanation map of a latent token", "01_explanation_maps", "explanation_maps.suppress_self"),
    7: ("map of a cluster", "02_segmentation", "segmentation.segment"),
    8: ("class of a pixel", "02_segmentation", "segmentation.segment"),
    9: ("gradient of the sum", "03_self_consistency", "explanation_maps.scalar_function"),
    10: ("gradient of the projection", "03_self_consistency", "explanation_maps.scalar_function"),
    11: ("perturbed image of a class", "03_self_consistency", "self_consistency.differences"),
    12: ("objective of the projection", "03_self_consistency", "self_consistency.fit_projection"),
    13: ("self-consistency loss", "03_self_consistency", "self_consistency.loss"),
    14: ("mask of a token's object", "04_interpretability_metrics", "interpretability_metrics.object_masks"),
    15: ("token contribution score", "05_summarization", "summarization.contribution_scores"),
    16: ("distance in the perturbation test", "04_interpretability_metrics",
         "interpretability_metrics.perturbation_distance"),
    17: ("ITIoU", "04_interpretability_metrics", "interpretability_metrics.itiou"),
    18: ("queries, keys and values", "00_preliminaries", "preliminaries.paper_block"),
    19: ("attention weights", "00_preliminaries", "preliminaries.paper_block"),
    20: ("heads together", "00_preliminaries", "preliminaries.paper_block"),
    21: ("first normalisation", "00_preliminaries", "preliminaries.paper_block"),
    22: ("feed-forward", "00_preliminaries", "preliminaries.paper_block"),
    23: ("output of a block", "00_preliminaries", "preliminaries.paper_block"),
}
UNWRITTEN = {}
TABLES = { # number: data sets of its rows; each is an entry of `ultra-nb reproduce`
    1: {"coco-stuff-27"},
    2: {"voc2012"},
    3: {"voc2012", "coco-stuff-27"},
    4: {"cityscapes"},
    5: {"potsdam-3"},
    6: {"voc2012", "coco-stuff-27", "cityscapes", "potsdam-3"},
    7: {"voc2012", "coco-stuff-27", "cityscapes", "potsdam-3"},
    8: {"voc2012", "coco-stuff-27", "potsdam-3"},
}
FIGURES = { # number: what it shows; each is an entry of `ultra-nb reproduce`
    1: "architecture",
    2: "segmentations",
    3: "maps and binary masks",
    4: "maps across layers",
    5: "token contribution scores",
    6: "quality against layer",
    7: "quality against layer, several models",
    8: "hard samples",
    9: "perturbed inputs",
    10: "ITIoU against threshold",
    11: "ITIoU against layer",
    12: "quality against clustering threshold",
    13: "clustering tree",
}

def prose(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]

def written(path):
    "Numbers of the equations that a notebook writes out"
    return [int(n) for cell in prose(path) for n in re.findall(r"\\tag\{(\d+)\}", cell)]

def test_the_list_is_complete():
    for numbered, last in ((EQUATIONS, 23), (TABLES, 8), (FIGURES, 13)):
        assert list(numbered) == list(range(1, last + 1))

def claimed(path):
    """Numbers of the equations that a notebook with a module has as its own: written out, in a heading or in the line
    below the title"""
    if path.parent.name != "nbs" or path.stem == "index": return set()
    found = set(written(path))
    for line in re.findall(r"^(?:#|>).*\beq\. ([\d, -]+)", "\n".join(prose(path)), flags=re.M):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
            found |= set(range(int(first), int(last or first) + 1))
    return found

@pytest.mark.parametrize("number", EQUATIONS)
def test_equation_has_one_home(number):
    _, home, name = EQUATIONS[number]
    assert [path.stem for path in NOTEBOOKS if number in claimed(path)] == [home]
    module, function = name.split(".")
    assert function in importlib.import_module(f"ultra_nb.{module}").__all__

def test_equations_are_written_once():
    assert sorted(n for path in NOTEBOOKS for n in written(path)) == sorted(set(EQUATIONS) - set(UNWRITTEN))

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_an_equation_has_one_number(path):
    "MathJax refuses a second \\tag in one display"
    for cell in prose(path):
        for display in re.findall(r"\$\$.+?\$\$", cell, flags=re.S): assert display.count(r"\tag") <= 1, display

def test_tables_and_figures_have_one_entry_each():
    assert set(ENTRIES) == {f"table{n}" for n in TABLES} | {f"fig{n}" for n in FIGURES}
    assert len({ENTRIES[f"fig{n}"].title for n in FIGURES}) == len(FIGURES)
    for n in FIGURES:
        home, = (path for path in NOTEBOOKS if f'@entry(\\"fig{n}\\"' in path.read_text(encoding="utf-8"))
        headings = re.findall(r"^#+ Figures? .*", "\n".join(prose(home)), flags=re.M)
        assert home.parent.name == "nbs" and any(re.search(rf"\b{n}\b", heading) for heading in headings), n

@pytest.mark.parametrize("number", TABLES)
def test_table_has_the_papers_rows(number):
    rows = paper_table(f"table{number}")
    assert set(rows.dataset) == TABLES[number] and set(rows.method) >= {"ULTra"} and rows.value.notna().all()
