"""Interpretability metrics where a notebook cannot go: against captum, by brute force, killed and resumed, several
processes, damaged data."""
import json, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest, torch
from PIL import Image
import child
from ultra_nb.datasets import scenes
from ultra_nb.explanation_maps import latents
from ultra_nb.interpretability_metrics import gradient_attention_rows, itiou_test, patch_maps
from ultra_nb.interpretability_metrics import perturbation_distance, perturbation_test, random_rows, ultra_rows
from ultra_nb.models import Backbone, load
from ultra_nb.preliminaries import find_blocks

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
CLI = [sys.executable, "-m", "ultra_nb.cli"]
RUNS = {"perturb": "perturb scenes --model scenes_dino --limit 8 --tokens 4 --share .2 .6 --baselines".split(),
        "itiou": "itiou scenes --model scenes_dino --limit 8 --tau .2 .5 --scalar sum --scalar energy".split()}

def run(*argv): return subprocess.run([*map(str, argv)], capture_output=True, text=True, env=ENV, timeout=300)
def results(out): return {name: (out / name).read_bytes() for name in ("rows.jsonl", "result.json")}

@pytest.fixture(scope="module")
def dino(): return load("scenes_dino")

@pytest.fixture(scope="module")
def picture(dino): return dino.transform(scenes("val", 3)[2].image)[None]

def test_gradient_x_attention_is_captums(dino, picture):
    captum = pytest.importorskip("captum.attr")
    attention, kept = dino.blocks[-1].attn, []
    hook = dino.blocks[-1].register_forward_hook(lambda module, args, out: kept.append(out))
    def value(x, token):
        dino.model(x)
        return kept.pop()[:, token].sum(-1)
    gradients = captum.LayerGradientXActivation(value, attention.attn_drop) # the dropout that A goes through
    attention.fused_attn = False # captum attributes to a module's output
    try: theirs = {t: gradients.attribute(picture, additional_forward_args=t)[0][:, t] for t in (0, 60, 151)}
    finally: attention.fused_attn = True; hook.remove()
    mine = gradient_attention_rows(dino, picture, dino.depth + 1, list(theirs))[0]
    for row, product in zip(mine, theirs.values(), strict=True):
        expected = product.clamp_min(0).mean(0).detach()
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-7)

def test_perturbation_distance_by_brute_force(dino, picture):
    "Masking, one token at a time, pixel block by pixel block, in float64"
    dino.model.double()
    try:
        x, tokens, n, side = picture.double(), [40, 99], len(dino.patches), 8
        maps = patch_maps(ultra_rows(mode="diagonal"), dino, x, 7, tokens)
        for sign in ("positive", "negative"):
            found = perturbation_distance(dino, x, maps, torch.tensor(tokens), .25, sign, "mask")
            for token, row, distance in zip(tokens, maps.tolist(), found.tolist(), strict=True):
                others = [j for j in range(n) if j != token - 1]
                others.sort(key=row.__getitem__, reverse=sign == "positive")
                changed = x.clone()
                for j in others[:round(.25 * (n - 1))]:
                    top, left = j // 14 * side, j % 14 * side
                    changed[..., top:top + side, left:left + side] = 0
                expected = (latents(dino, x)[0, token] - latents(dino, changed)[0, token]).norm().item()
                assert abs(distance - expected) < 1e-10
    finally: dino.model.float()

def test_noise_is_the_same_for_both_signs_and_every_explainer(dino):
    "At a share of 1 all other patches change, whatever a map says: every number must agree"
    explainers = {"ULTra_S": ultra_rows(mode="diagonal"), "random": random_rows}
    found = perturbation_test(dino, scenes("val", 3), explainers, shares=(1.,), k=3)
    for kind in ("mask", "noise"):
        keys = [f"{kind}-{sign}" for sign in ("positive", "negative")]
        assert len({round(m[key], 3) for m in found.metrics.values() for key in keys}) == 1

def test_language_models_have_no_patches():
    net = child.llama()
    backbone = Backbone(net, find_blocks(net), 32, name="llama")
    for test in (perturbation_test, itiou_test):
        with pytest.raises(ValueError, match="llama is a language model"): test(backbone, scenes("val", 2))

@pytest.fixture(scope="module", params=list(RUNS))
def whole(request, tmp_path_factory):
    "A command, and its run from start to end"
    out = tmp_path_factory.mktemp("metrics") / request.param
    done = run(*CLI, *RUNS[request.param], "--out", out)
    assert done.returncode == 0, done.stderr
    return RUNS[request.param], out

def test_killed_and_resumed_gives_the_same_bytes(whole, tmp_path):
    argv, out = whole
    killed = tmp_path / "killed"
    child.killed([*CLI, *argv, "--out", killed], killed / "part-0.jsonl", 2, ENV)
    assert run(*CLI, *argv, "--out", killed).returncode == 0
    assert results(killed) == results(out)
    record = json.loads((out / "record.json").read_text())
    assert {"metrics", "n", "seed", "settings", "commit", "weights_hash"} <= set(record)

def test_two_processes_give_the_result_of_one(whole, tmp_path):
    argv, out = whole
    done = run(sys.executable, *child.TWO_PROCESSES, *CLI[1:], *argv, "--out", tmp_path / "shared")
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path / "shared") == results(out) and done.stdout.count("8 images of") == 1

def test_damaged_image_and_void_masks_are_named(tmp_path):
    for name in ("images", "masks"): (tmp_path / "own" / name).mkdir(parents=True)
    for i, sample in enumerate(scenes("val", 3)):
        sample.image.save(tmp_path / f"own/images/{i}.png")
        Image.fromarray(np.full_like(sample.mask, 255) if i == 0 else sample.mask).save(tmp_path / f"own/masks/{i}.png")
    argv = [*CLI, "itiou", "folder", "--root", tmp_path / "own", "--model", "scenes_dino", "--out", tmp_path / "out"]
    good = (tmp_path / "own/images/1.png").read_bytes()
    (tmp_path / "own/images/1.png").write_bytes(good[:400])
    done = run(*argv)
    assert done.returncode == 1 and "not measured: 1: " in done.stderr
    assert "1 of 3 images could not be read" in done.stderr.splitlines()[-1]
    assert run(*argv, "--skip-bad").returncode == 0
    (tmp_path / "own/images/1.png").write_bytes(good)
    assert run(*argv).returncode == 0
    found = json.loads((tmp_path / "out/result.json").read_text())
    assert (found["n"], found["counted"], found["void_tokens"], found["bad"]) == (3, 2, 196, {})
