"What the notebook of models cannot hold well: fresh processes, a hub that never answers, damaged files by the hundred."
import json, os, random, socket, subprocess, sys
from pathlib import Path

import pytest, torch
from safetensors.torch import save_file
from ultra_nb.models import load
from ultra_nb.weights import WeightsError, read_weights

ROOT = Path(__file__).parents[1]

def python(code, **env):
    "What `code` prints as JSON in a fresh process"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])

IMPORT = """
import json, sys, torch
before = set(sys.modules)
import ultra_nb.models
print(json.dumps(sorted(set(sys.modules) - before)))
"""

def test_import_is_light():
    loaded = python(IMPORT)
    assert not {"timm", "open_clip", "transformers", "torchvision", "huggingface_hub"} & set(loaded)

FAIL = """
import json, time, timm, open_clip, transformers
from ultra_nb.models import load
start = time.perf_counter()
try: load(%r)
except ValueError as e: print(json.dumps([time.perf_counter() - start, str(e)]))
"""

@pytest.fixture
def stalled():
    "Address of a server that takes connections and never answers"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        yield f"http://127.0.0.1:{s.getsockname()[1]}"

@pytest.mark.parametrize("name", ["dino_vits16", "clip_vitb32", "llama2_7b"])
def test_a_hub_that_never_answers(name, stalled, tmp_path):
    hub = dict(HF_ENDPOINT=stalled, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="0")
    seconds, message = python(FAIL % name, **hub, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    assert seconds < 10 and "\n" not in message and f"load('{name}', weights=F" in message and "--weights F" in message

@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_files(suffix, tmp_path):
    "Cut anywhere or with bytes changed: the same tensors' names, or one line; never another exception"
    good, bad = tmp_path/f"good{suffix}", tmp_path/f"bad{suffix}"
    state = dict(a=torch.arange(64.), b=torch.ones(4, 4, dtype=torch.float16))
    save_file(state, good) if suffix == ".safetensors" else torch.save(state, good)
    raw, rng = good.read_bytes(), random.Random(0)
    for i in range(300):
        data = bytearray(raw[:rng.randrange(len(raw))] if i % 2 else raw)
        for _ in range(rng.randrange(4)):
            if data: data[rng.randrange(len(data))] = rng.randrange(256)
        bad.write_bytes(data)
        try: read_weights(bad)
        except WeightsError as e: assert "\n" not in str(e)

def test_weights_with_code_do_not_run_it(tmp_path):
    class Bomb:
        def __reduce__(self): return os.system, (f"touch {tmp_path/'boom'}",)
    for wrap in (lambda b: b, lambda b: dict(state_dict=dict(w=torch.ones(2)), extra=b)):
        for zipped in (True, False):
            torch.save(wrap(Bomb()), tmp_path/"bomb.pth", _use_new_zipfile_serialization=zipped)
            with pytest.raises(WeightsError, match="holds code"): load("test_vit", weights=tmp_path/"bomb.pth")
    assert not (tmp_path/"boom").exists()

def test_the_shipped_vit():
    """scenes_dino: loads, takes other sizes with positions that lie on the picture, refuses another model's weights in
    one line; exact maps work on it"""
    from safetensors.torch import load_file
    from ultra_nb.explanation_maps import explain
    from ultra_nb.models import names
    from ultra_nb.weights import asset
    from ultra_nb.benchmark import per_token_maps
    b, wide, same_count = (load("scenes_dino", image_size=size) for size in (None, (64, 160), (56, 224)))
    assert "scenes_dino" in names() and (b.tokens, b.prefix, b.grid, b.tokenizer) == (197, 1, (14, 14), None)
    state = load_file(asset("scenes_dino.safetensors"))
    assert all(v.equal(state[k]) for m in (b, wide) for k, v in m.model.state_dict().items())
    assert (wide.grid, same_count.grid) == ((8, 20), (7, 28))
    x = torch.randn(1, 3, *b.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert b.model(x).equal(b.model(x))
        assert all(m.model(torch.zeros(1, 3, *m.size)).isfinite().all() for m in (wide, same_count))
    maps, truth = explain(b, x, tokens=[0, 100]), per_token_maps(b.model, x, b.blocks, b.depth + 1, tokens=[0, 100])
    assert maps.shape == (1, 2, 197) and ((maps - truth).abs().max() / truth.max()).item() < 1e-4
    told = "scenes_clip.safetensors does not fit scenes_dino: .* the file looks like an open_clip CLIP"
    with pytest.raises(WeightsError, match=told) as caught:
        load("scenes_dino", weights=asset("scenes_clip.safetensors"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="nearest good sizes"): load("scenes_dino", image_size=100)
