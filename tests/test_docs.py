"""The documentation, built from the notebooks without Quarto, as a reader meets it; what Quarto's own build needs, as
far as it can be seen here."""
import ast, configparser, importlib, inspect, json, os, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest, yaml
from axe_playwright_python.sync_playwright import Axe

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))
INI = configparser.ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini", encoding="utf-8")

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("docs") / "site"
    argv, env = [sys.executable, "docs/build.py", str(site)], os.environ | dict(HF_HUB_OFFLINE="1")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return site

class Page(HTMLParser):
    "Ids, links, embedded things and text of a page"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.parts, self.text = set(), [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        if tag == "a" and "href" in attrs: self.links.append(attrs["href"])
        if tag in ("img", "link", "script", "iframe"): self.parts.append(attrs.get("src") or attrs.get("href") or "")
    def handle_data(self, data): self.text += data

@pytest.fixture(scope="module")
def pages(site): return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}

def test_every_notebook_has_its_page(pages):
    expected = (p.relative_to(ROOT / "nbs").with_suffix(".html").as_posix() for p in NOTEBOOKS)
    assert set(pages) == {re.sub(r"(^|/)\d+_", r"\1", name) for name in expected}

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_nothing_but_title_and_purpose_in_the_first_cell(path):
    "nbdev makes the page's front matter of that cell and drops what else it holds"
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    put = "put what follows the purpose into a cell of its own"
    assert re.fullmatch(r"# [^\n]+\n+> [^\n]+\n?", first), f"{put}:\n{first}"

def test_links_inside_the_site_lead_somewhere(site, pages):
    for name, page in pages.items():
        for url in page.links + page.parts:
            parts = urlsplit(url)
            if parts.scheme: continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            assert target.exists(), (name, url)
            if parts.fragment and target.suffix == ".html":
                there = pages[target.resolve().relative_to(site.resolve()).as_posix()]
                assert unquote(parts.fragment) in there.ids, (name, url)

def test_pages_need_no_network(pages):
    for name, page in pages.items(): assert all(urlsplit(part).scheme in ("", "data") for part in page.parts), name

CODE = r"<pre[^>]*>.*?</pre>|<div class=\"highlight\">.*?</div>|<(code|td)>.*?</\1>"

def test_equations_are_mathml(site, pages):
    equations = 0
    for name in pages:
        whole = (site / name).read_text(encoding="utf-8")
        maths = re.findall(r"<math.*?</math>", whole, flags=re.S)
        assert not [m for m in maths if "\\" in m], name
        assert not re.search(r"\$\$|\\tag|\$\\", re.sub(CODE, "", whole, flags=re.S)), name
        equations += len(maths)
    assert equations > 100

def exported():
    "Public functions and classes of the library, by module"
    for path in sorted((ROOT / "ultra_nb").glob("[!_]*.py")):
        module = importlib.import_module(f"ultra_nb.{path.stem}")
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing) or inspect.isclass(thing): yield path.stem, name, thing

def test_every_public_function_shows_its_parameters(site):
    pages = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    for module, name, thing in exported():
        heading = f'<a href="#{name.lower()}">{name}</a></h3>'
        section = next((page.partition(heading)[2] for page in pages if heading in page), "").partition("</pre>")[0]
        shown = re.sub(r"<[^>]*>", "", section)
        assert shown, f"no page says anything of {name} of {module}"
        if not inspect.isfunction(thing): continue
        assert all(re.search(rf"\b{p}\b", shown) for p in inspect.signature(thing).parameters), (module, name)

def parameters(function):
    "Each parameter, its annotation and the comment on its line"
    source = inspect.getsource(function)
    lines, spec = source.splitlines(), ast.parse(source).body[0].args
    for a in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]:
        kind = ast.unparse(a.annotation) if a.annotation else ""
        yield a.arg, kind, lines[a.end_lineno - 1].partition(" # ")[2]

def test_parameters_have_types_and_tensors_their_shapes():
    missing = []
    for module, name, thing in exported():
        if module == "cli" or not inspect.isfunction(thing): continue # what a command takes stands in its --help
        for parameter, kind, comment in parameters(thing):
            if not kind and not comment: missing.append(f"{module}.{name}: {parameter} has neither type nor comment")
            tensor = re.fullmatch(r"(Tensor|np\.ndarray)( \| None)?", kind)
            shape = re.search(r"\[.*\]|shape|as in|(of|from) `", comment)
            if tensor and not shape: missing.append(f"{module}.{name}: {parameter} has no shape")
    assert not missing, "\n".join(missing)

BRIGHTNESS = """['color', 'backgroundColor'].map(c =>
    getComputedStyle(document.body)[c].match(/\\d+/g).slice(0, 3).reduce((sum, v) => sum + +v, 0))"""

def test_pages_in_a_browser(site, pages, browser):
    """On a desk and on a phone, light and dark: no error in the console, nothing asked of the network, every picture
    there, no page wider than the screen"""
    page, said = browser.new_page(), []
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("requestfailed", lambda r: said.append(r.url[:100]))
    page.on("request", lambda r: r.url.startswith("http") and said.append(r.url))
    for name in pages:
        page.goto((site / name).as_uri())
        assert not page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.alt)"), name
        for width, scheme in ((1280, "light"), (390, "dark")):
            page.set_viewport_size(dict(width=width, height=900))
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
            ink, paper = page.evaluate(BRIGHTNESS)
            assert (ink > paper) == (scheme == "dark") and abs(ink - paper) > 450, (name, scheme)
        assert not said, (name, said)
    page.close()

SPARED = dict(rules={"empty-table-header": dict(enabled=False)}) # an equation is no text to it

@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_a_screen_reader_finds_its_way(site, browser, scheme):
    page = browser.new_page(color_scheme=scheme)
    for name in ("index.html", "explanation_maps.html"):
        page.goto((site / name).as_uri())
        found = Axe().run(page, options=SPARED).response["violations"]
        assert not found, (name, json.dumps(found, indent=1))
    page.close()

def test_the_first_page_can_be_explored(site, browser):
    page = browser.new_page(viewport=dict(width=1200, height=900))
    page.goto((site / "index.html").as_uri())
    page.locator(".ultra-explorer.live .photo .ultra-picture").click(position=dict(x=5, y=5))
    assert "token=1" in page.url and "Token 1, row 1, column 1" in page.locator(".photo").inner_text()
    page.close()

def test_quarto_can_run_what_it_runs():
    """nbdev executes cells that import, alone, before Quarto renders: in notebooks that export, such a cell does
    nothing else"""
    for path in NOTEBOOKS:
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        sources = ["".join(c["source"]) for c in cells]
        if not any("#| default_exp" in s for s in sources): continue
        for source in sources:
            if re.search(r"#\| export", source) or "nbdev_export()" in source: continue
            nodes = list(ast.walk(ast.parse(re.sub(r"^\s*[%!].*", "", source, flags=re.M))))
            if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes):
                alone = not any(isinstance(n, (ast.Expr, ast.Assign)) for n in nodes)
                assert alone, f"{path.name}: give the imports a cell of their own\n{source}"

class Notebook:
    "What an IPython is asked for, under the name that Colab's has, or under Jupyter's"
    def __init__(self, place): self.place, self.asked = place, []
    def __str__(self): return f"<{self.place} object>"
    def system(self, line): self.asked.append(line)
    def run_line_magic(self, name, line): self.asked.append(f"%{name} {line}")

@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("0*.ipynb")), ids=lambda p: p.stem)
def test_a_chapter_opens_in_colab(path):
    "By a badge on its top; the project is fetched and installed there, and nowhere else"
    ini, sources = INI["DEFAULT"], ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"][1:3]]
    page = f"https://colab.research.google.com/github/{ini['user']}/{ini['repo']}/blob/{ini['branch']}"
    assert sources[0] == f"[![Open in Colab](../figures/colab.svg)]({page}/nbs/{path.name})"
    assert sources[1].startswith("#| hide\n")
    colab, jupyter = Notebook("google.colab._shell.Shell"), Notebook("ipykernel.zmqshell.ZMQInteractiveShell")
    for shell in (colab, jupyter): exec(sources[1], dict(get_ipython=lambda shell=shell: shell))
    install = r"git clone -q --depth 1 (\S+) && pip install -q '\./(\w+)\[(.*)\]'"
    fetched, name, extras = re.fullmatch(install, colab.asked[0]).groups()
    assert fetched == ini["git_url"] and name == ini["repo"] and colab.asked[1:] == [f"%cd {name}/nbs"]
    assert all(f"{extra}_requirements" in ini for extra in extras.split(",")) and not jupyter.asked

def test_hosting_is_configured():
    ini, quarto = INI["DEFAULT"], yaml.safe_load((ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8"))
    assert ini["git_url"] == f"https://github.com/{ini['user']}/{ini['repo']}"
    assert (ini["doc_host"], ini["doc_baseurl"]) == (f"https://{ini['user']}.github.io", f"/{ini['repo']}")
    assert quarto["project"]["type"] == "website" and quarto["metadata-files"] == ["nbdev.yml", "sidebar.yml"]
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8"))
    steps = flow["jobs"]["docs"]["steps"]
    assert [s["with"]["path"] for s in steps if "upload-pages" in s.get("uses", "")] == [ini["doc_path"]]

@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_workflows_are_well_formed(path):
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow["name"] == path.stem and True in flow # YAML reads the key `on` as True
    assert flow["permissions"]["contents"] == "read"
    for job in flow["jobs"].values():
        assert job["runs-on"] and all(("uses" in s) != ("run" in s) for s in job["steps"])
        assert all(re.fullmatch(r"[\w.-]+/[\w./-]+@[\w./]+", s["uses"]) for s in job["steps"] if "uses" in s)
