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
    if path.suffix == ".ipynb":
        cells = json.loads(whole)["cells"]
        whole = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", whole, flags=re.S | re.M)

def anchors(path):
    "What headings are called in links"
    headings = re.findall(r"^#+ (.+)$", text(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}

def problem(path, url):
    "What is wrong with a link of a document, or None"
    parts = urlsplit(url)
    if parts.scheme:
        address = parts.scheme in ("http", "https") and re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc)
        return None if address else "no address"
    target = path.parent / unquote(parts.path) if parts.path else path
    if not target.is_file(): return "no such file"
    if ROOT not in target.resolve().parents: return "outside the repository"
    return "no such heading" if parts.fragment and unquote(parts.fragment) not in anchors(target) else None

def links(path): return re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text(path))

@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    assert not {url: why for url in links(path) if (why := problem(path, url))}

def test_links_are_found_and_judged():
    readme = ROOT / "README.md"
    assert len(links(readme)) > 20
    said = {"LICENSE": None, "README.md#citation": None, "https://arxiv.org/abs/2104.14294": None,
            "nothing.md": "no such file", "README.md#nothing": "no such heading", "#citation": None,
            "../secret": "no such file", "http:/a": "no address", "ftp://a.b": "no address",
            "https://a b": "no address"}
    assert {url: problem(readme, url) for url in said} == said
