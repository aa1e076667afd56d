"Real weights and photographs, where a folder with them lies beside the project (or where ULTRA_NB_KIT names one)."
import json, os
from pathlib import Path
import pytest, torch
from ultra_nb.images import read_image
from ultra_nb.explanation_maps import explain, minmax, suppress_self
from ultra_nb.models import load
from ultra_nb.benchmark import per_token_maps

KIT = Path(os.environ.get("ULTRA_NB_KIT", Path(__file__).parent.parent.parent / "shared" / "kit"))
pytestmark = pytest.mark.skipif(not KIT.exists(), reason="no folder with real weights and photographs")

@pytest.fixture(scope="module")
def vit(): return load("vit_tiny_patch16_224", weights=KIT / "weights/vit_tiny_patch16_224.safetensors")

@pytest.fixture(scope="module")
def photos(vit):
    names = (KIT / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").read_text().split()[::70]
    return torch.stack([vit.transform(read_image(KIT / f"VOCdevkit/VOC2012/JPEGImages/{n}.jpg")) for n in names])

@pytest.mark.parametrize("layer", [9, 13])
def test_diagonal_is_close_to_exact_for_the_sum(vit, photos, layer):
    tokens = range(1, 197, 9)
    exact, diagonal = (explain(vit, photos, layer=layer, tokens=tokens, mode=mode) for mode in ("exact", "diagonal"))
    exact, diagonal = (minmax(suppress_self(maps, tokens)) for maps in (exact, diagonal))
    exact, diagonal = (m - m.mean(-1, keepdim=True) for m in (exact, diagonal))
    r = (exact * diagonal).sum(-1) / (exact.norm(dim=-1) * diagonal.norm(dim=-1))
    assert r.mean() >= 0.99

def test_float32_maps_agree_with_the_papers_procedure_in_float64(vit, photos):
    tokens = [0, 50, 120]
    single = explain(vit, photos[:1], tokens=tokens)
    vit.model.double()
    double = per_token_maps(vit.model, photos[:1].double(), vit.blocks, 13, tokens=tokens)
    vit.model.float()
    assert ((single - double).abs().amax((1, 2)) / double.amax((1, 2))).max() < 1e-4

def test_chunk_batch_and_threads_only_round(vit, photos):
    tokens, threads = range(0, 197, 15), torch.get_num_threads()
    maps = explain(vit, photos[:2], tokens=tokens)
    one_by_one = torch.cat([explain(vit, p[None], tokens=tokens) for p in photos[:2]])
    others = [explain(vit, photos[:2], tokens=tokens, chunk=3), one_by_one]
    torch.set_num_threads(1)
    others.append(explain(vit, photos[:2], tokens=tokens))
    torch.set_num_threads(threads)
    for other in others: assert ((other - maps).abs().max() / maps.max()).item() < 1e-5
    assert torch.equal(explain(vit, photos[:2], tokens=tokens), maps)

def test_evaluation_of_photographs(tmp_path, capsys):
    "Twelve photographs with every method; ULTra_S and latent tokens beat one cluster"
    from ultra_nb.cli import main
    weights = KIT / "weights/vit_tiny_patch16_224.safetensors"
    argv = ["evaluate", "voc", "--root", KIT, "--model", "vit_tiny_patch16_224", "--weights", weights, "--layer", "12",
            "--limit", "12", "--out", tmp_path / "run"]
    assert main([*map(str, argv)]) == 0
    metrics = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    assert {"ULTra_S", "ULTra_E", "one cluster", "latent tokens", "rollout", "LeGrad", "class maps"} <= set(metrics)
    assert min(metrics[m]["U.mIoU"] for m in ("ULTra_S", "latent tokens")) > metrics["one cluster"]["U.mIoU"]

@pytest.mark.parametrize("argv", [
    ("folder", "--root", "camvid", "--image-folder", "val", "--mask-folder", "valannot", "--ignore", "11"),
    ("coco-stuff", "--root", "cocostuff"),
    ("cityscapes", "--root", "cityscapes", "--split", "train"),
], ids=lambda a: a[0])
def test_other_photographs_go_through_their_loaders(argv, capsys):
    from ultra_nb.cli import main
    assert main(["evaluate", argv[0], "--root", str(KIT / argv[2]), *argv[3:], "--scalar", "sum", "--limit", "2"]) == 0
    assert "2 images of" in capsys.readouterr().out
