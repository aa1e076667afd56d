"""Architectures as their libraries build them: a sample of the zoo (`make zoo` judges all of it), and what the README
says of it."""
import json, os, shutil
from collections import Counter
from pathlib import Path
import pytest, timm, torch, transformers
import open_clip
import zoo
from ultra_nb.explanation_maps import explain

ROOT = Path(__file__).parent.parent
RECORD = json.loads((ROOT / "nbs/studies/records/zoo.json").read_text())
NAMES = ("library", "kind", "family", "name")

def test_a_sample_of_the_zoo_is_judged_as_its_record_says():
    cases = zoo.zoo()
    sample = [i for i, c in enumerate(cases) if i % 11 == 0 or c.library in ("torch", "open_clip")]
    same_libraries = RECORD["versions"] == {m.__name__: m.__version__ for m in (open_clip, timm, torch, transformers)}
    known = {tuple(r[k] for k in NAMES): r for r in RECORD["cases"]}
    for found, _ in zoo.sweep(sample, 1):
        name = tuple(found[k] for k in NAMES)
        for mode in ("exact", "diagonal"):
            now, then = found[mode], known[name][mode]
            assert now["outcome"] in ("correct", "refused"), (name, mode, now)
            if same_libraries: assert now["outcome"] == then["outcome"], (name, mode, now, then)

def test_the_record_is_of_the_whole_zoo_and_nothing_in_it_is_wrong():
    names = [tuple(r[k] for k in NAMES) for r in RECORD["cases"]]
    assert names == [(c.library, c.kind, c.family, c.name) for c in zoo.zoo()]
    assert {r[mode]["outcome"] for r in RECORD["cases"] for mode in ("exact", "diagonal")} == {"correct", "refused"}
    assert all(r[mode]["error"] < 1e-8 for r in RECORD["cases"] for mode in ("exact", "diagonal") if "error" in r[mode])
    right = [r for r in RECORD["cases"] if r["exact"]["outcome"] == "correct"]
    assert sum(r["library"] == "timm" for r in right) >= 90
    assert len({r["family"] for r in right if r["kind"] == "text"}) >= 60
    seeing = [r for r in right if r["library"] == "transformers" and r["kind"] in ("pictures", "sound")]
    assert len({r["family"] for r in seeing}) >= 20

def test_the_table_in_the_readme_is_made_of_the_record():
    table = zoo.works(RECORD["cases"])
    put = "put what `python tests/zoo.py` prints last into nbs/index.ipynb"
    assert table in (ROOT / "README.md").read_text(), put

@pytest.mark.parametrize("spoil", [lambda maps: maps.mT, lambda maps: maps * 1.001], ids=["exchanged", "a thousandth"])
def test_the_judge_finds_a_map_that_is_off(spoil, monkeypatch):
    "Row and column of every map exchanged, or a thousandth off"
    monkeypatch.setattr(zoo, "explain", lambda *args, **kwargs: spoil(explain(*args, **kwargs)))
    (found, _), = zoo.sweep([next(i for i, c in enumerate(zoo.zoo()) if c.name == "LlamaForCausalLM")], 1)
    assert found["exact"]["outcome"] == found["diagonal"]["outcome"] == "WRONG"

def test_maps_traced_for_a_compiler_are_right_or_refused(monkeypatch):
    monkeypatch.setattr(zoo, "explain", lambda *args, **how: explain(*args, **how, compiled=True))
    monkeypatch.setattr(torch, "compile", lambda trace, dynamic: trace)
    judged = [r for r, _ in zoo.sweep(range(5, len(zoo.zoo()), 23), 1)]
    for mode in ("exact", "diagonal"):
        outcomes = Counter(r[mode]["outcome"] for r in judged)
        assert set(outcomes) == {"correct", "refused"} and outcomes["correct"] >= 8

@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.parametrize("mode", ["exact", "diagonal"])
def test_compiled_maps(mode):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    maps, compiled = (explain(model, x, tokens=range(7), mode=mode, chunk=4, compiled=c) for c in (False, True))
    assert (maps - compiled).abs().max() < 1e-5 * maps.abs().max()

@pytest.mark.parametrize("name, kwargs, words", [
    ("swin_tiny_patch4_window7_224", {}, "blocks="),
    ("vit_tiny_patch16_224", dict(fused_attn=False), "fused"),
])
def test_models_that_cannot_work_say_so(name, kwargs, words):
    model = timm.create_model(name).eval()
    for m in model.modules():
        if hasattr(m, "fused_attn") and kwargs: m.fused_attn = False
    with pytest.raises(ValueError, match=words) as caught: explain(model, torch.zeros(1, 3, 224, 224))
    assert "\n" not in str(caught.value)

def test_cross_attention_is_refused():
    rng = torch.Generator().manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
    class Decoder(torch.nn.Module):
        def __init__(self): super().__init__(); self.layers = torch.nn.ModuleList([layer])
        def forward(self, z): return self.layers[0](z, z)
    z = torch.randn(1, 4, 16, generator=rng)
    with pytest.raises(ValueError, match="called attention 2 times"): explain(Decoder(), dict(z=z))
