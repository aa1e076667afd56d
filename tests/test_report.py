"The report as a reader meets it, in a real browser: light and dark, on a desk and on a phone."
import html, json, re
from itertools import pairwise
import pytest
from axe_playwright_python.sync_playwright import Axe
from ultra_nb.cli import ENTRY_NAMES, main
from ultra_nb.entries import CLAIMS, VERDICTS
from ultra_nb.records import read_json, sealed, unsealed, write_json
from ultra_nb.report import report_page

@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report"
    wanted = ["table3", "table6", "table8", "fig1", "fig3", "fig10", "fig13"]
    argv = ["reproduce", *wanted, "--limit", "2", "--out", str(out)]
    assert main(argv) == 0
    return out

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = text => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = c => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor);
      if (c[3] == 255) return c;
    }
    return [255, 255, 255, 255];
  };
  const found = new Map();
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) continue;
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05), name = `${e.tagName}.${e.className}`;
    found.set(name, Math.min(ratio, found.get(name) ?? 99));
  }
  return Object.fromEntries(found);
}"""
IMAGES = """[...document.querySelectorAll("figure > img")].filter(i => !i.closest(".ultra-explorer")).map(i =>
  [i.complete && i.naturalWidth > 0, i.alt.length, i.getBoundingClientRect().width])"""
FOCUS = """() => {
  const e = document.activeElement;
  return [e.textContent, getComputedStyle(e).outlineStyle, e.getBoundingClientRect().left >= 0];
}"""
LANDMARKS = """[document.documentElement.lang,
  ...['header', 'nav', 'main', 'footer', 'h1'].map(t => document.querySelectorAll(t).length)]"""
HEARD = { # what a screen reader needs
  "tables have captions and heads":
    "[...document.querySelectorAll('table')].every(t => t.caption && t.caption.textContent.trim() && t.tHead)",
  "heads say what they head":
    "[...document.querySelectorAll('th')].every(h => ['col', 'row', 'rowgroup'].includes(h.scope))",
  "regions have names":
    """[...document.querySelectorAll('[role=region], section, article')]
         .every(e => document.getElementById(e.getAttribute('aria-labelledby'))?.textContent.trim())""",
  "links of the navigation lead somewhere":
    "[...document.querySelectorAll('nav a')].every(a => document.getElementById(a.hash.slice(1)))",
}

@pytest.mark.parametrize("width", (1200, 390))
@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_in_a_browser(report, browser, scheme, width):
    page, wrong, asked = browser.new_page(viewport=dict(width=width, height=844), color_scheme=scheme), [], []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((report / "index.html").as_uri())
    page.wait_for_load_state("networkidle")
    assert wrong == [] and [url for url in asked if not url.startswith("data:")] == [(report / "index.html").as_uri()]
    images = page.evaluate(IMAGES)
    assert len(images) == 4 and all(loaded and alt > 40 and shown > 100 for loaded, alt, shown in images)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = Axe().run(page).response["violations"]
    assert not found, json.dumps(found, indent=1)
    contrast = page.evaluate(CONTRAST)
    assert len(contrast) > 10 and min(contrast.values()) >= 4.5, contrast
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()

def test_with_the_keyboard(report, browser):
    page = browser.new_page(viewport=dict(width=390, height=844))
    page.goto((report / "index.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUS) == ["Skip to the report", "solid", True]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "scroll": break
    before = page.evaluate("document.activeElement.scrollLeft")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")
    assert before == 0
    page.close()

def test_for_a_screen_reader(report, browser):
    page = browser.new_page()
    page.goto((report / "index.html").as_uri())
    assert page.evaluate(LANDMARKS) == ["en", 1, 1, 1, 1, 1]
    for what, holds in HEARD.items(): assert page.evaluate(holds), what
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids)) and set(ENTRY_NAMES) <= set(ids)
    page.close()

def test_every_entry_has_its_verdict(report):
    page = (report / "index.html").read_text()
    articles = re.findall(r"<article.*?</article>", page, re.S)
    for name in ENTRY_NAMES:
        part, = (article for article in articles if f' id="{name}"' in article)
        verdicts = re.findall(r'class="status [\w-]+">([\w ]+)<', part)
        assert set(verdicts) <= set(VERDICTS) and bool(verdicts) == (name in CLAIMS), name
        made = (report / f"records/{name}.json").exists()
        assert made or f"not asked for: ultra-nb reproduce {name}" in part and verdicts in ([], ["cannot tell"]), name
        assert not name.startswith("table") or "<table>" in part

def test_the_answer_comes_first(report):
    page = (report / "index.html").read_text()
    answer = re.search(r'<section aria-labelledby="answer".*?</section>', page, re.S)
    assert answer.start() < page.index('id="explore"') < page.index('id="figures"') < page.index('id="tables"')
    assert set(re.findall(r'href="#(\w+)"', answer[0])) == set(CLAIMS)
    assert "None of the paper's 129 numbers" in html.unescape(answer[0]) # 24 of them stand in two tables
    assert all(meaning in html.unescape(answer[0]) for meaning in VERDICTS.values())

def test_one_measurement_is_shown_once(report):
    page = (report / "index.html").read_text()
    group = re.search(r'<h3 id="table3-group">.*?</article>', page, re.S)[0]
    assert all(f'<h4 id="{name}">' in group for name in ("table3", "table6"))
    assert group.count('<caption id="embedded-') == 1 and group.count('<caption id="waiting-') == 2
    folded = re.findall(r"<details>.*?<summary>(.*?)</summary>", group, re.S)
    assert len(folded) == 2 and all("not run" in line and "--profile paper" in line for line in folded)

def test_the_first_column_stays(report, browser):
    page = browser.new_page(viewport=dict(width=390, height=844))
    page.goto((report / "index.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    lefts = page.evaluate("""[...document.querySelectorAll('.scroll')].map(box => {
        box.scrollLeft = 1e4;
        const first = box.querySelector('tbody th').getBoundingClientRect().left - box.getBoundingClientRect().left;
        return [first, box.scrollLeft];
    })""")
    assert any(moved > 100 for _, moved in lefts) and all(abs(left - 1) < 1 for left, _ in lefts), lefts
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()

def test_what_is_in_records_is_escaped(report, tmp_path):
    (tmp_path / "records").mkdir()
    record = unsealed(read_json(report / "records/fig1.json"))
    record["settings"] |= dict(shown="<script>alert(1)</script>", files={}, missing=["<b>&"])
    write_json(tmp_path / "records/fig1.json", sealed(record))
    write_json(tmp_path / "reproduction.json", sealed(dict(profile="paper", lacking=["<img src=x>"])))
    (tmp_path / "problems.json").write_text(json.dumps(dict(fig2="<i>no</i>")))
    own = r'<div class="ultra-explorer">.*?</script>|<script type="module">'
    page = re.sub(own, "", report_page(tmp_path), flags=re.S)
    assert not re.search(r"<script|<b>|<img|<i>", page) and "&lt;script&gt;" in page and "&lt;i&gt;no" in page

def test_an_installed_package_has_no_studies(report, monkeypatch):
    assert "Which scalar is best without training?" in report_page(report)
    monkeypatch.setattr("ultra_nb.report.study_record", lambda name: None)
    assert "this copy of ultra_nb has none" in report_page(report)
