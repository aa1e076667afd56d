"Interpretability metrics where a notebook cannot go: against captum, by brute force, killed and resumed, several processes, damaged data."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest, torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM
from ultra_nb.data import scenes
from ultra_nb.explanation_maps import latents
from ultra_nb.interpretability_metrics import gradient_attention_rows, itiou_test, patch_maps, perturbation_distance, perturbation_test, random_rows, ultra_rows
from ultra_nb.models import Backbone, find_blocks, load

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
CLI = [sys.executable, "-m", "ultra_nb.cli"]
RUNS = {"perturb": ["perturb", "scenes", "--model", "scenes_dino", "--limit", "8", "--tokens", "4", "--share", ".2", ".6", "--baselines"], "itiou": ["itiou", "scenes", "--model", "scenes_dino", "--limit", "8", "--tau", ".2", ".5", "--scalar", "sum", "--scalar", "energy"]}

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
    attention.fused_attn = False # captum attributes to a module's output: the dropout that A goes through
    try: theirs = {t: captum.LayerGradientXActivation(value, attention.attn_drop).attribute(picture, additional_forward_args=t)[0][:, t] for t in (0, 60, 151)}
    finally: attention.fused_attn = True; hook.remove()
    mine = gradient_attention_rows(dino, picture, dino.depth + 1, list(theirs))[0]
    for row, product in zip(mine, theirs.values()): torch.testing.assert_close(row, product.clamp_min(0).mean(0).detach(), rtol=1e-4, atol=1e-7)

def test_perturbation_distance_by_brute_force(dino, picture):
    "Masking, one token at a time, pixel block by pixel block, in float64"
    dino.model.double()
    try:
        x, tokens, n, side = picture.double(), [40, 99], len(dino.patches), 8
        maps = patch_maps(ultra_rows(mode="diagonal"), dino, x, 7, tokens)
        for sign in ("positive", "negative"):
            found = perturbation_distance(dino, x, maps, torch.tensor(tokens), .25, sign, "mask")
            for token, row, distance in zip(tokens, maps.tolist(), found.tolist()):
                others = sorted((j for j in range(n) if j != token - 1), key=lambda j: row[j], reverse=sign == "positive")[:round(.25 * (n - 1))]
                changed = x.clone()
                for j in others: changed[..., j // 14 * side:j // 14 * side + side, j % 14 * side:j % 14 * side + side] = 0
                assert abs(distance - (latents(dino, x)[0, token] - latents(dino, changed)[0, token]).norm().item()) < 1e-10
    finally: dino.model.float()

def test_noise_is_the_same_for_both_signs_and_every_explainer(dino):
    "At a share of 1 all other patches change, whatever a map says: every number must agree"
    found = perturbation_test(dino, scenes("val", 3), {"ULTra_S": ultra_rows(mode="diagonal"), "random": random_rows}, shares=(1.,), k=3)
    for kind in ("mask", "noise"): assert len({round(m[f"{kind}-{sign}"], 3) for m in found.metrics.values() for sign in ("positive", "negative")}) == 1

def test_language_models_have_no_patches():
    net = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4))
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
    going = subprocess.Popen([*CLI, *argv, "--out", str(tmp_path / "killed")], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "killed/part-0.jsonl"
    while going.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= 2): time.sleep(.01)
    going.send_signal(signal.SIGKILL)
    going.wait()
    assert run(*CLI, *argv, "--out", tmp_path / "killed").returncode == 0
    assert results(tmp_path / "killed") == results(out)
    assert {"metrics", "n", "seed", "settings", "commit", "weights_hash"} <= set(json.loads((out / "record.json").read_text()))

def test_two_processes_give_the_result_of_one(whole, tmp_path):
    argv, out = whole
    done = run(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "ultra_nb.cli", *argv, "--out", tmp_path / "shared")
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
    assert done.returncode == 1 and "not measured: 1: " in done.stderr and "1 of 3 images could not be read" in done.stderr.splitlines()[-1]
    assert run(*argv, "--skip-bad").returncode == 0
    (tmp_path / "own/images/1.png").write_bytes(good)
    assert run(*argv).returncode == 0
    found = json.loads((tmp_path / "out/result.json").read_text())
    assert (found["n"], found["counted"], found["void_tokens"], found["bad"]) == (3, 2, 196, {})
