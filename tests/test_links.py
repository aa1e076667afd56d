"Links and pictures in README.md and in the notebooks' text lead somewhere."
import json, re
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))]

def text(path):
    "Markdown of a document, code left out"
    whole = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb": whole = "\n\n".join("".join(c["source"]) for c in json.loads(whole)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", whole, flags=re.S | re.M)

def anchors(path):
    "What headings are called in links"
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text(path), flags=re.M)}

def problem(path, url):
    "What is wrong with a link of a document, or None"
    parts = urlsplit(url)
    if parts.scheme: return None if parts.scheme in ("http", "https") and re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc) else "no address"
    target = path.parent / unquote(parts.path) if parts.path else path
    if not target.is_file(): return "no such file"
    if ROOT not in target.resolve().parents: return "outside the repository"
    return "no such heading" if parts.fragment and unquote(parts.fragment) not in anchors(target) else None

def links(path): return re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text(path))

@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    assert not {url: why for url in links(path) if (why := problem(path, url))}

def test_links_are_found_and_judged():
    assert len(links(ROOT / "README.md")) > 20
    readme = ROOT / "README.md"
    said = {url: problem(readme, url) for url in ("LICENSE", "README.md#citation", "https://arxiv.org/abs/2104.14294", "nothing.md", "README.md#nothing", "#citation", "../secret", "http:/a", "ftp://a.b", "https://a b")}
    assert list(said.values()) == [None, None, None, "no such file", "no such heading", None, "no such file", "no address", "no address", "no address"]
