"Figures change only when code does: drawn again, they are the ones in figures/."
import shutil
from pathlib import Path
import pytest
from matplotlib import pyplot as plt
from matplotlib.testing.compare import compare_images
from ultra_nb.figures import save
from ultra_nb.entries import ENTRIES, POINTS, PROFILES, Missing, Sources, figure3, figure_of, tokens_at

FIGURES = Path(__file__).parent.parent / "figures"
TOLERANCE = 2 # root mean square over pixels, of 255: drawn twice on a machine it is 0; other processors round otherwise
QUICK = [1, 2, 3, 4, 5, 8, 9, 13] # the others take minutes: `make reproduce` draws them

@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    yield Sources(PROFILES["embedded"], tmp_path_factory.mktemp("reproduction"))
    plt.close("all")

def difference(path, expected):
    "None where a picture is the committed one within the tolerance, else what differs; a copy, for it writes beside it"
    shutil.copy(FIGURES / f"{expected}.png", path.parent / "committed.png")
    return compare_images(path.parent / "committed.png", path, TOLERANCE)

@pytest.mark.parametrize("number", QUICK)
def test_figure_is_the_committed_one(number, sources, tmp_path):
    try: drawn = figure_of(f"fig{number}", sources, tmp_path / "drawn.png")
    except Missing as lack: pytest.skip(str(lack))
    assert (said := difference(drawn, f"figure{number}")) is None, said

@pytest.mark.parametrize("number", QUICK)
def test_drawn_twice_it_is_the_same_bytes(number, sources, tmp_path):
    try: once, twice = (figure_of(f"fig{number}", sources, tmp_path / f"{time}.png") for time in ("once", "twice"))
    except Missing as lack: pytest.skip(str(lack))
    assert once.read_bytes() == twice.read_bytes()

def test_one_other_token_is_seen(sources, tmp_path):
    "The tolerance lets no real change through: figure 3 with one of its tokens a patch further"
    tokens = tokens_at(sources.shown, POINTS)
    same = save(figure3(sources.shown, sources.photo, tokens), tmp_path / "same.png")
    other = save(figure3(sources.shown, sources.photo, [*tokens[:-1], tokens[-1] + 1]), tmp_path / "other.png")
    assert difference(same, "figure3") is None and "RMS" in difference(other, "figure3")

def test_every_figure_is_there():
    names = {f"figure{name.removeprefix('fig')}" for name in ENTRIES if name.startswith("fig")}
    assert {p.stem for p in FIGURES.glob("figure*.png")} == names
