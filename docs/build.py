"""Renders the notebooks to HTML without Quarto and without a network.

nbdev's own processing comes first, then nbconvert; equations become MathML.

    python docs/build.py [SITE]        from the top of the repository; SITE is _site by default

It stands outside the library, which needs none of these packages, and outside nbs/, whose other files Quarto would
publish.
"""
import re, shutil, sys
from html import escape
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from string import Template
import nbformat, yaml
from execnb.nbio import nb2str
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, nbglob
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults
from nbdev.showdoc import show_doc
from pygments.formatters import HtmlFormatter
from ultra_nb.explorer import shared_file
from ultra_nb.pages import example_part

HERE = Path(__file__).parent
STEPS = [step for step in FilterDefaults().base_procs() if step.__name__ != "exec_show_docs"] # nothing runs
COLOURS = dict(light="default", dark="github-dark")

def mathml(tex, display):
    "An equation as MathML, its number beside it"
    tex = re.sub(r"\\(mathcal|mathbb)\s+(\w)", r"\\\1{\2}", tex).replace(r"\arg", r"\operatorname{arg}")
    return convert(re.sub(r"\\tag\{(\d+)\}", r"\\qquad\\text{(\1)}", tex), display=display)

def anchor(text):
    "The id that Quarto gives a heading"
    words = re.sub(r"<math.*?</math>|<[^>]*>", "", text, flags=re.S).lower()
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", words).strip())

class Renderer(IPythonRenderer):
    "Markdown of one page: links to notebooks and figures hold on the site, headings are remembered"
    def __init__(self, root, hosted):
        super().__init__(escape=False)
        self.root, self.hosted, self.headings = root, hosted, []

    def local(self, url):
        url = re.sub(r"^(\.\./)+figures/", f"{self.root}figures/", url.replace(self.hosted, self.root))
        return url if ":" in url else re.sub(r"(?:\d+_)?(\w+)\.ipynb", r"\1.html", url)

    def link(self, text, url, title=None): return super().link(text, self.local(url), title)
    def image(self, text, url, title=None): return super().image(text, self.local(url), title)
    def block_math(self, body): return f'<div class="equation">{mathml(body, "block")}</div>\n'
    def inline_math(self, body): return mathml(body, "inline")

    def heading(self, text, level, **attrs):
        text = re.sub(r"</?a\b[^>]*>", "", text) # the heading is a link itself
        self.headings.append((level, anchor(text), text))
        return f'<h{level} id="{anchor(text)}"><a href="#{anchor(text)}">{text}</a></h{level}>\n'

def documented(name, module):
    "Signature, with the comment behind each parameter, and docstring of an exported name, in Markdown"
    said = NbdevLookup().linkify(show_doc(attrgetter(name)(module))._repr_markdown_())
    link = r'<a class="source" href="\1">source</a>'
    return re.sub(r"\[source\]\(([^)]*)\)\{[^}]*\}", link, said.removeprefix("---\n\n"))

def processed(path, lib):
    "A notebook as nbdev publishes it, and its front matter"
    steps = NBProcessor(path, STEPS)
    rooms = dict.fromkeys(room for cell in steps.nb.cells for key in ("default_exp", "export")
                          for room in cell.directives_.get(key, ())) # a chapter's figures go to another than its own
    modules = [import_module(f"{lib}.{room}") for room in rooms]
    steps.process()
    notebook = nbformat.reads(nb2str(steps.nb), 4)
    for cell in notebook.cells:
        if cell.cell_type != "code": continue
        outputs_alone = "#| echo: false" in cell.source
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if name := re.fullmatch(r"show_doc\((\S+)\)", cell.source):
            home = next(module for module in modules if hasattr(module, name[1].split(".")[0]))
            cell.update(cell_type="markdown", source=documented(name[1], home))
        elif outputs_alone: cell.metadata["transient"] = dict(remove_source=True)
    return notebook, yaml.safe_load(notebook.cells.pop(0).source.strip().strip("-"))

def page(notebook, lead, root, hosted, top=""):
    "Body of a page with its purpose on top, what follows it, and its headings"
    renderer = Renderer(root, hosted)
    html = lambda text: MarkdownWithMath(renderer=renderer).render(text)
    filters = {"markdown2html": html, "clean_html": lambda text: text} # the project's own code: nothing to clean
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True,
                            filters=filters)
    body = exporter.from_notebook_node(notebook)[0].replace("<pre>", '<pre tabindex="0">') # scrolled by keys, too
    return f'<div class="lead">{html(lead)}</div>\n{top}{body}', renderer.headings

def explorer():
    "The explorer of a photograph, for the first page"
    return f'{example_part()}\n<script type="module">\n{shared_file("explorer.js")}\n</script>\n'

def navigation(titles, here, root, headings):
    "Links to all pages, and to the headings of the one being read"
    inner = "".join(f'<li class="h{level}"><a href="#{name}">{text}</a></li>' for level, name, text in headings)
    def item(path, title):
        if path != here: return f'<li><a href="{root}{path}">{title}</a></li>'
        return f'<li><a href="{root}{path}" aria-current="page">{title}</a><ul>{inner}</ul></li>'
    return "".join(item(path, title) for path, title in titles.items())

def build(site):
    cfg = get_config()
    found = {}
    chapters_first = lambda path: (len(path.parts), path.parent.name, path.stem != "index", path.stem)
    for source in sorted(nbglob(cfg.nbs_path, as_path=True), key=chapters_first):
        name = source.relative_to(cfg.nbs_path).with_name(re.sub(r"^\d+_", "", source.stem) + ".html").as_posix()
        found[name] = processed(source, cfg.lib_name)
    titles = {name: front["title"] for name, (_, front) in found.items()}
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(cfg.config_path / "figures", site / "figures")
    frame = Template((HERE / "page.html").read_text(encoding="utf-8"))
    for name, (notebook, front) in found.items():
        root = "../" * name.count("/")
        lead = front.get("description", "")
        top = explorer() if name == "index.html" else ""
        body, headings = page(notebook, lead, root, f"{cfg.doc_host}{cfg.doc_baseurl}/", top)
        (site / name).parent.mkdir(exist_ok=True)
        parts = dict(site=cfg.title, title=front["title"], lead=escape(re.sub("[*`]", "", lead)), root=root, body=body,
                     navigation=navigation(titles, name, root, headings))
        (site / name).write_text(frame.substitute(parts), encoding="utf-8")
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in COLOURS.values())
    style = f"{(HERE / 'style.css').read_text(encoding='utf-8')}{shared_file('explorer.css')}{light}"
    (site / "style.css").write_text(f"{style}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n", encoding="utf-8")
    return site / "index.html"

if __name__ == "__main__": print(build(Path(sys.argv[1] if len(sys.argv) > 1 else "_site")))
