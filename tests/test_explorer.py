"""The explorer in a real JupyterLab: a browser clicks, and the pictures on the page are the ones that the library
computes."""
import io, json, os, secrets, signal, socket, subprocess, sys, time
from base64 import b64decode
from urllib.error import URLError
from urllib.request import urlopen
import numpy as np, pytest, torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from ultra_nb.scenes import scene
from ultra_nb.explorer import PictureExplorer, SummaryExplorer, explore
from ultra_nb.models import load, wrap
from ultra_nb.summarization import contribution_scores, word_scores

CONTEXT, SUMMARY = "My <b>friend</b> wants to sell the red sofa & the door.", "My friend sells the red sofa."
CELLS = ["""import torch
torch.set_num_threads(1)
from PIL import Image
from ultra_nb.scenes import scene
from ultra_nb.explorer import explore, explore_text
from ultra_nb.models import load
explore(load("scenes_dino"), Image.fromarray(scene(7).image))""",
f"explore_text(load('tldr_llama'), {CONTEXT!r}, {SUMMARY!r})"]

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def write_home(home):
    "A folder with the notebook, and settings that ask the network for nothing"
    cells = [dict(cell_type="code", source=source, metadata={}, outputs=[], execution_count=None, id=f"cell-{i}")
             for i, source in enumerate(CELLS)]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    notebook = dict(cells=cells, nbformat=4, nbformat_minor=5, metadata=kernel)
    apputils = "config/lab/user-settings/@jupyterlab/apputils-extension"
    settings = home / apputils / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    (home / "explore.ipynb").write_text(json.dumps(notebook))

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address of a JupyterLab of its own, over a folder with one notebook; stopped at the end, with its kernels"
    home, port, token = tmp_path_factory.mktemp("lab"), free_port(), secrets.token_hex(16)
    write_home(home)
    own = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    env = os.environ | own | dict(HF_HUB_OFFLINE="1", IPYTHONDIR=str(home / "ipython"), OMP_NUM_THREADS="1")
    argv = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
            "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home}",
            "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(argv, stdout=log, stderr=log, cwd=home, start_new_session=True, env=env)
    try:
        for _ in range(300):
            if server.poll() is not None: pytest.fail(f"JupyterLab stopped: {(home / 'log').read_text()[-2000:]}")
            try: urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2).close(); break
            except (URLError, OSError): time.sleep(.1)
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token={token}"
    finally:
        server.send_signal(signal.SIGTERM)
        try: server.wait(15)
        except subprocess.TimeoutExpired: pass
        try: os.killpg(server.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        server.wait()

@pytest.fixture(scope="module")
def page(browser, lab):
    "The notebook in a browser, all cells run; console errors are collected in page.errors"
    page = browser.new_page(viewport=dict(width=1300, height=1400))
    page.errors = []
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    page.on("console", lambda m: m.type == "error" and page.errors.append(f"{m.text} {m.location}"))
    page.goto(lab)
    page.locator(".jp-Notebook .jp-CodeCell").nth(1).wait_for(timeout=60_000)
    page.evaluate("""async () => {
        await jupyterapp.restored;
        const { context, sessionContext } = jupyterapp.shell.currentWidget;
        await context.ready; await sessionContext.ready;
        await jupyterapp.commands.execute('notebook:run-all-cells'); }""")
    failed = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    page.locator(".ultra-text").or_(failed).first.wait_for(timeout=180_000)
    assert not failed.count(), failed.inner_text()
    yield page
    page.close()

def arrived(page):
    "The four pictures on the page: caption to pixels, as the browser has decoded them"
    fetch = """async () => Promise.all([...document.querySelectorAll('.ultra-pictures figure')].map(async figure => {
        const image = figure.querySelector('img'); await image.decode();
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        const file = new Uint8Array(await (await canvas.convertToBlob()).arrayBuffer());
        return [image.alt, btoa(Array.from(file, c => String.fromCharCode(c)).join(''))]; }))"""
    pictures = {caption: Image.open(io.BytesIO(b64decode(png))) for caption, png in page.evaluate(fetch)}
    return {caption: np.asarray(picture.convert("RGB")).astype(int) for caption, picture in pictures.items()}

def check(page, shown, **choice):
    "Waits for the captions of a choice, and compares its pictures with the library's"
    expected = shown.panels(**choice)
    captions = """titles =>
        [...document.querySelectorAll('.ultra-pictures figcaption')].map(c => c.textContent).join() === titles"""
    page.wait_for_function(captions, arg=",".join(expected), timeout=60_000)
    found = arrived(page)
    assert list(found) == list(expected)
    for caption, pixels in expected.items():
        assert found[caption].shape == pixels.shape, caption
        assert (abs(found[caption] - pixels) > 2).mean() < 1e-3, caption
    return [*found.values()]

def named_control(page, cell, name):
    "The control with this label below a cell"
    label = page.locator(f"label:text-is('{name}')")
    return page.locator(".jp-CodeCell").nth(cell).locator(".widget-inline-hbox", has=label)

def test_a_click_a_key_and_a_slider_in_jupyterlab(page):
    shown = PictureExplorer(load("scenes_dino"), Image.fromarray(scene(7).image))
    _, before, *_ = check(page, shown, token=106)
    pictures = page.locator(".ultra-pictures img")
    box = pictures.nth(0).bounding_box()
    pictures.nth(0).click(position=dict(x=box["width"] * 9.5 / 14, y=box["height"] * 10.5 / 14))
    _, after, *_ = check(page, shown, token=1 + 10 * 14 + 9)
    assert abs(before - after).mean() > 2
    page.keyboard.press("ArrowDown"), page.keyboard.press("ArrowRight")
    check(page, shown, token=1 + 11 * 14 + 10)
    pictures.nth(2).click(position=dict(x=1, y=1))
    check(page, shown, token=1)
    control = lambda name: named_control(page, 0, name)
    control("layer").locator("[role=slider]").press("ArrowLeft")
    _, lower, *_ = check(page, shown, token=1, layer=6)
    control("mode").locator("select").select_option("exact")
    control("clusters").locator("[role=slider]").press("ArrowLeft")
    control("threshold").locator("[role=slider]").press("ArrowRight")
    _, exact, *_ = check(page, shown, token=1, layer=6, mode="exact", threshold=.25, clusters=4)
    assert abs(exact - lower).mean() > .1
    assert not page.errors

def test_a_word_that_is_clicked_in_jupyterlab(page):
    shown = SummaryExplorer(load("tldr_llama"), CONTEXT, SUMMARY)
    def check(word, **options):
        expected = [[w.text, f"{w.score:.3g}"] for w in word_scores(shown.scores(word, **options))]
        marked = """words => words === JSON.stringify(
            [...document.querySelectorAll('.ultra-text mark')].map(m => [m.textContent, m.title]))"""
        page.wait_for_function(marked, arg=json.dumps(expected, separators=(",", ":")), timeout=60_000)
    check(None)
    page.get_by_role("button", name="sofa.").click()
    check(5)
    named_control(page, 1, "layer").locator("[role=slider]").press("ArrowLeft")
    check(5, layer=3)
    page.get_by_role("button", name="all words").press("Enter")
    check(None, layer=3)
    assert not page.errors

# Without a browser: what the notebook's assertions leave out.

def test_without_the_widget_packages_the_module_imports_and_a_widget_says_what_it_needs():
    code = """import sys
sys.modules.update(ipywidgets=None, anywidget=None)
from ultra_nb.explorer import explore
try: explore(None, None)
except ImportError as e: print(e)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the explorer needs the package anywidget: pip install 'ultra_nb[notebook]'\n"

def test_registers_and_narrow_pictures():
    from timm.models import VisionTransformer
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    vit = VisionTransformer(**sizes, reg_tokens=4)
    for size, mode in (((500, 3), "L"), ((1, 400), "1"), ((60, 40), "RGBA")):
        shown = PictureExplorer(wrap(vit, 32, (.5,) * 3, (.5,) * 3), Image.new(mode, size))
        assert max(shown.size) == 256 and min(shown.size) >= 1
        assert (shown.token_at(0, 0), shown.token_at(.99, .99), shown.neighbour(2, 0, 0)) == (5, 20, 5)
        for token in (0, 4, 5, 20):
            panels = shown.panels(token, clusters=12).values()
            assert all(p.shape == (*shown.size, 3) and p.dtype == np.uint8 for p in panels)
        assert list(shown.panels(4))[0] == "token 4" and (list(shown.panels(4).values())[0] == shown.pixels).all()

def test_what_goes_wrong_later_is_said_in_the_widget():
    backbone = load("scenes_dino")
    pictures, controls, status = explore(backbone, Image.fromarray(scene(7).image)).children
    layer = {c.description: c for c in controls.children}["layer"]
    before = pictures.panels
    with torch.no_grad(): backbone.blocks[0].mlp.fc1.weight.fill_(float("nan"))
    layer.value = 4
    assert "the latents contain NaN or infinity" in status.value and "\n" not in status.value
    assert pictures.panels is before
    layer.value = 7
    assert not status.value and pictures.panels == before

@pytest.mark.parametrize("summary", ["a naïve 🙂🙂 謝謝 boss", "  one ", "x  y\n z"])
def test_every_word_has_its_tokens(summary):
    llama, context = load("tldr_llama"), "Ein Wörtchen 🙂 mehr."
    tokenizer = llama.tokenizer
    for bos in (False, True):
        if bos:
            special = [("</s>", tokenizer.eos_token_id)]
            around = TemplateProcessing(single="</s> $A </s>", special_tokens=special)
            tokenizer.backend_tokenizer.post_processor = around
        shown = SummaryExplorer(llama, context, summary)
        words = [tokenizer.decode([shown.joined.input_ids[t] for t in own]).strip() for _, own in shown.words]
        assert words == summary.split()
        expected = contribution_scores(llama, tokenizer, context, summary, mode="diagonal")
        assert torch.allclose(shown.scores().scores, expected.scores, rtol=1e-4)
