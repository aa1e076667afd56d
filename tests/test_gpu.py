"""A GPU gives the CPU's numbers: maps, segments, scores, training, and the commands with --device cuda. Left out where
there is none."""
import json
from unittest import mock
import numpy as np
import pytest, timm, torch
import ultra_nb.explanation_maps as em
from ultra_nb.cli import main
from ultra_nb.explanation_maps import explain, suppress_self
from ultra_nb.models import load, wrap
from ultra_nb.posts import Posts
from ultra_nb.preliminaries import attention_rollout, class_map
from ultra_nb.scenes import Scenes
from ultra_nb.segmentation import segment
from ultra_nb.self_consistency import fit_projection, load_projection
from ultra_nb.summarization import contribution_scores

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-10} # of the largest number
POST = Posts("val", 1)[0]
KINDS = ("timm", "scenes_clip", "scenes_dino", "tldr_llama")

@pytest.fixture(autouse=True)
def plain_float32(monkeypatch): monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

def off(found, expected): return ((found.cpu() - expected).abs().max() / expected.abs().max()).item()

def tiny_vit(device, dtype=torch.float32):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10).eval().to(device, dtype)
    return wrap(model, (160, 160), name="test_vit")

def model_and_inputs(kind, device, dtype=torch.float32):
    "The same model and inputs on a device"
    backbone = tiny_vit(device, dtype) if kind == "timm" else load(kind, device=device, dtype=dtype)
    if backbone.grid is None:
        return backbone, dict(input_ids=torch.arange(3, 83, device=device)[None] * 7 % 500)
    x = torch.randn(2, 3, *backbone.size, generator=torch.Generator().manual_seed(0))
    return backbone, x.to(device, dtype)

def test_float32_is_float32():
    torch.backends.cudnn.allow_tf32 = True
    load("scenes_dino", device="cuda")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32

@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("mode", ["exact", "diagonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_maps(kind, mode, dtype):
    tokens = range(0, 80, 7)
    for scalar in ("sum", "energy", "normalized"):
        on_cpu, on_gpu = (explain(*model_and_inputs(kind, device, dtype), tokens=tokens, mode=mode, scalar=scalar)
                          for device in ("cpu", "cuda"))
        # transformers makes a Llama's rotations in float32 whatever the weights are
        assert on_gpu.is_cuda and off(on_gpu, on_cpu) < (1e-6 if kind == "tldr_llama" and dtype == torch.float64
                                                         else CLOSE[dtype])

def test_maps_of_all_tokens_in_any_chunk_twice():
    backbone, x = model_and_inputs("scenes_clip", "cuda")
    maps = explain(backbone, x)
    assert torch.equal(explain(backbone, x), maps)
    for chunk in (1, 50): assert off(explain(backbone, x, chunk=chunk), maps.cpu()) < 1e-5

def test_one_graph_and_block_by_block_are_one():
    backbone, x = model_and_inputs("scenes_clip", "cuda")
    at_once = explain(backbone, x, mode="diagonal")
    with mock.patch.object(em, "_room", lambda device, on_cpu, share: 0):
        em._found.clear()
        by_block = explain(backbone, x, mode="diagonal")
    em._found.clear()
    assert off(by_block, at_once.cpu()) < 1e-5

def test_where_memory_runs_out_the_chunk_is_halved():
    "A real shortage: the process may have what one target takes, and a bit"
    backbone, x = model_and_inputs("scenes_clip", "cuda")
    expected = explain(backbone, x, chunk=1).cpu()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    asked, rows = [], em._exact_rows
    def watched(notes, g, tokens, *how):
        asked.append(len(tokens))
        return rows(notes, g, tokens, *how)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with mock.patch.object(em, "_exact_rows", watched): found = explain(backbone, x, chunk=197).cpu()
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    assert asked[0] == 197 and asked[1] == 98 and off(found, expected) < 1e-5

@pytest.mark.parametrize("mode", ["exact", "diagonal"])
def test_compiled_maps(mode):
    backbone, x = model_and_inputs("scenes_clip", "cuda")
    assert off(explain(backbone, x, mode=mode, compiled=True), explain(backbone, x, mode=mode).cpu()) < 1e-5

@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_class_map_and_rollout(dtype):
    found = {device: (class_map(backbone.model, x, 3), attention_rollout(backbone.model, x))
             for device in ("cpu", "cuda") for backbone, x in [model_and_inputs("timm", device, dtype)]}
    for on_gpu, on_cpu in zip(found["cuda"], found["cpu"], strict=True): assert off(on_gpu, on_cpu) < CLOSE[dtype]

@pytest.mark.parametrize("mode", ["exact", "diagonal"])
@pytest.mark.parametrize("kind", ["scenes_clip", "scenes_dino"])
def test_segments(kind, mode, record_property):
    "Labels are equal; where two maps are equal up to rounding either may win, in at most one pixel of a thousand"
    from PIL import Image
    for scene in Scenes("val", 2):
        labels = []
        for device in ("cpu", "cuda"):
            backbone = load(kind, device=device)
            rows = explain(backbone, backbone.inputs(Image.fromarray(scene.image)), tokens=backbone.patches, mode=mode)
            maps = suppress_self(rows, backbone.patches, backbone.prefix)[0]
            labels.append(segment(maps, backbone.grid, backbone.size, k=4).labels)
        ties = (labels[0] != labels[1]).mean()
        record_property("share of pixels with another label", ties)
        assert ties <= 1e-3

def test_contribution_scores():
    for mode in ("exact", "diagonal"):
        found = [contribution_scores(backbone, backbone.tokenizer, POST.context, POST.summary, mode=mode)
                 for backbone in (load("tldr_llama", device=device) for device in ("cpu", "cuda"))]
        on_cpu, on_gpu = (f.scores for f in found)
        assert off(on_gpu, on_cpu) < CLOSE[torch.float32]

def test_learning_w(tmp_path):
    from PIL import Image
    pictures = [Image.fromarray(s.image) for s in Scenes("train", 8)]
    on_cpu, on_gpu = (fit_projection(load("scenes_clip", device=device), pictures, layer=5, passes=1, batch=3)
                      for device in ("cpu", "cuda"))
    assert np.allclose(on_gpu.history["loss"], on_cpu.history["loss"], rtol=.01)
    assert off(on_gpu.W, on_cpu.W) < 1e-3

COMMANDS = {
    "evaluate": "evaluate scenes --limit 3 --layer 5",
    "evaluate, exact": "evaluate scenes --limit 3 --scalar sum --mode exact --model scenes_dino",
    "itiou": "itiou scenes --limit 3 --baselines",
    "perturb": "perturb scenes --limit 3 --baselines --tokens 4",
}

@pytest.mark.parametrize("name", COMMANDS)
def test_a_measurement(name, tmp_path):
    "Metrics in percent, or distances, of three scenes; one label or patch that changes sides is a tie"
    results = []
    for device in ("cpu", "cuda"):
        assert main([*COMMANDS[name].split(), "--device", device, "--out", str(tmp_path / device)]) == 0
        results.append(json.loads((tmp_path / device / "result.json").read_text())["metrics"])
    assert json.loads((tmp_path / "cuda/record.json").read_text())["device"] == torch.cuda.get_device_name()
    assert results[0].keys() == results[1].keys()
    for method, expected in results[0].items():
        for key, value in expected.items():
            assert results[1][method][key] == pytest.approx(value, rel=.02, abs=.5), (method, key)

@pytest.mark.parametrize("argv", [
    "explain --out OUT/maps.png", "explain --mode diagonal --model scenes_dino --out OUT/maps.png",
    "segment --out OUT/mask.png --overlay OUT/over.png", "fit-w scenes --images 8 --passes 1 --out OUT/W.safetensors",
    "summarize OUT/post.txt --html OUT/post.html", "bench maps --repeats 1 --image-size 64 --out OUT/bench.json",
    "bench gpu --quick --out OUT/gpu.json",
])
def test_a_command(argv, tmp_path):
    (tmp_path / "post.txt").write_text(POST.context)
    assert main([*argv.replace("OUT", str(tmp_path)).split(), "--device", "cuda"]) == 0

def test_learned_w_serves_on_both(tmp_path):
    out = tmp_path / "W.safetensors"
    learn = f"fit-w scenes --images 8 --passes 1 --layer 5 --device cuda --out {out}"
    assert main(learn.split()) == 0 and not load_projection(out).W.is_cuda
    for device in ("cpu", "cuda"):
        argv = f"segment --layer 5 --scalar {out} --device {device} --out {tmp_path / device}.png"
        assert main(argv.split()) == 0
