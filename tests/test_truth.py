"""No map is wrong without a word: what a model may do that a tape does not see is followed exactly, or refused in one
line."""
import threading
from contextlib import contextmanager
from functools import reduce
import pytest, timm, torch, transformers
import open_clip
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
import child
from ultra_nb.beyond import explain_attended
from ultra_nb.explanation_maps import explain, latents
from ultra_nb.preliminaries import attention_rollout, attention_tap, class_map, find_blocks
from ultra_nb.benchmark import per_token_maps

WORDS = dict(input_ids=torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0)))
SIZES = child.SIZES | dict(vocab_size=50)
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

def shaken(model, seed=0):
    "In float64 and eval mode, every parameter moved, so that no zero at initialisation hides anything"
    rng = torch.Generator().manual_seed(seed)
    for p in model.double().eval().parameters(): p.data += .1 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return model

def vit(**options): return shaken(child.vit(**options))

class Block(nn.Module):
    "A pre-norm block on tokens [B, N, 16]; subclasses change a part of it"
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), nn.Linear(16, 48)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU())
    def heads(self, z): return self.attn(self.norm(z)).view(*z.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
    def mix(self, z): return F.scaled_dot_product_attention(*self.heads(z)).transpose(1, 2).flatten(2)
    def forward(self, z):
        z = z + self.mix(z)
        return z + self.mlp(z)

class Stack(nn.Module):
    def __init__(self, *blocks, between=lambda z: z):
        super().__init__()
        self.blocks, self.between = nn.ModuleList(blocks), between
    def forward(self, z): return reduce(lambda z, b: b(self.between(z)), self.blocks[1:], self.blocks[0](z))

def stack(block=Block, n=3, **kwargs):
    torch.manual_seed(0)
    return shaken(Stack(*(block() for _ in range(n)), **kwargs))

def off(maps, model, inputs, layer=None, scalar="sum"):
    "Largest difference from the paper's procedure on the whole model, relative to the largest relevance"
    blocks = find_blocks(model)
    truth = per_token_maps(model, inputs, blocks, layer or len(blocks) + 1, scalar)
    return ((maps - truth).abs().max() / truth.max()).item()

@contextmanager
def refused(words):
    "What follows must fail with one short line that has these words"
    with pytest.raises(ValueError, match=words) as caught: yield
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

# Something between the blocks

BETWEEN = {"scale": lambda z: 2 * z, "scale in place": lambda z: z.mul_(2), "norm": lambda z: F.layer_norm(z, (16,)),
           "projection": lambda z: z.flip(-1), "mixing": lambda z: z.cumsum(1)}

@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("mode", ["exact", "diagonal"])
@pytest.mark.parametrize("layer", [2, None]) # z^(2) is what enters block 2
def test_something_between_the_blocks(between, mode, layer):
    model = stack(between=BETWEEN[between])
    with refused("something stands between"): explain(model, dict(z=TOKENS), layer=layer, mode=mode)

def test_a_break_above_the_layer_does_not_matter():
    torch.manual_seed(0)
    model = shaken(Stack(*(Block() for _ in range(4))))
    model.forward = lambda z: model.blocks[3](2 * reduce(lambda z, b: b(z), model.blocks[:3], z))
    for layer in (2, 3): assert off(explain(model, dict(z=TOKENS), layer=layer), model, dict(z=TOKENS), layer) < 1e-8
    for layer in (4, 5):
        with refused("layers up to 3 can be explained"): explain(model, dict(z=TOKENS), layer=layer)

def test_a_constant_between_blocks_is_followed():
    model = stack(between=lambda z: z + TOKENS)
    for scalar in ("sum", "energy"):
        assert off(explain(model, dict(z=TOKENS), scalar=scalar), model, dict(z=TOKENS), scalar=scalar) < 1e-8
    shifted = latents(model, dict(z=TOKENS), layer=2) # z^(2) is what enters block 2, the constant in it
    torch.testing.assert_close(shifted, latents(stack(), dict(z=TOKENS), layer=2) + TOKENS)
    maps = explain(model, dict(z=TOKENS), layer=2, scalar=lambda z: ((z - TOKENS)**2).sum(-1))
    torch.testing.assert_close(maps, explain(stack(), dict(z=TOKENS), layer=2, scalar="energy"))

class Wide(Block):
    def forward(self, z): return super().forward(z.double())

@pytest.mark.parametrize("mode", ["exact", "diagonal"])
def test_a_change_of_type_between_blocks_is_nothing(mode):
    maps = explain(stack(Wide, between=lambda z: z.float()), dict(z=TOKENS), mode=mode)
    torch.testing.assert_close(maps.double(), explain(stack(), dict(z=TOKENS), mode=mode), rtol=1e-5, atol=1e-6)

def test_blocks_that_are_no_chain():
    twins = timm.create_model("twins_pcpvt_small", img_size=64).double().eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with refused("something stands between|attention of shape"): explain(twins, x, blocks=twins.blocks[3])
    parallel = vit(block_fn=timm.models.vision_transformer.ParallelThingsBlock)
    with refused("several lists"): explain(parallel, PICTURES)
    with refused("called attention 2 times"): explain(parallel, PICTURES, blocks=parallel.blocks)
    with refused("something stands between|does not read|mixes"):
        explain(parallel, PICTURES, blocks=parallel.blocks[0].attns)

# Tokens that mix outside attention

class Convolved(Block):
    def __init__(self): super().__init__(); self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=16)
    def forward(self, z): return super().forward(z + self.conv(z.mT).mT)

class Gated(Block):
    def forward(self, z): return super().forward(z) * z.mean(1, keepdim=True).sigmoid()

@pytest.mark.parametrize("block", [Convolved, Gated])
def test_tokens_that_mix_outside_attention(block):
    model = stack(block)
    assert off(explain(model, dict(z=TOKENS)), model, dict(z=TOKENS)) < 1e-8
    with refused("use mode='exact'"): explain(model, dict(z=TOKENS), mode="diagonal")
    explain(model, dict(z=TOKENS[:1, :1]), mode="diagonal") # one token cannot mix, and says nothing about more
    with refused("use mode='exact'"): explain(model, dict(z=TOKENS), mode="diagonal")

MIXING = {"FalconH1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8),
          "Doge": {}}

@pytest.mark.parametrize("name", MIXING)
def test_language_models_that_mix_outside_attention(name):
    model = shaken(child.causal(name, "sdpa", **SIZES, num_key_value_heads=2, **MIXING[name]))
    assert off(explain(model, WORDS), model, WORDS) < 1e-6
    with refused("use mode='exact'"): explain(model, WORDS, mode="diagonal")

# Roads beside the tokens

def test_keys_and_values_shared_across_layers():
    sizes = dict(head_dim=8, global_head_dim=8, num_key_value_heads=2, vocab_size_per_layer_input=50,
                 hidden_size_per_layer_input=8, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    for shared in (0, 1):
        model = shaken(child.causal("Gemma4Text", "sdpa", **SIZES | sizes, num_kv_shared_layers=shared))
        for layer in (2, 4) if shared else (2, 4, 5):
            assert off(explain(model, WORDS, layer=layer), model, WORDS, layer) < 1e-6
    with refused("other than by its tokens|other than its tokens"): explain(model, WORDS, layer=5)

class Skipping(Stack):
    "The third block also reads what the first one put out"
    def forward(self, z):
        first = self.blocks[0](z)
        second = self.blocks[1](first)
        self.blocks[2].first = first
        return self.blocks[2](second)

class Reading(Block):
    first = 0.
    def forward(self, z): return super().forward(z) + self.first

def test_a_skip_connection_across_blocks():
    torch.manual_seed(0)
    model = shaken(Skipping(Reading(), Reading(), Reading()))
    with refused("layers up to 3"): explain(model, dict(z=TOKENS))
    model.blocks[2].first = 0.
    assert off(explain(model, dict(z=TOKENS), layer=3), model, dict(z=TOKENS), 3) < 1e-8

# Masks with a meaning of their own

@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_causal_bias(bias):
    class Causal(Block):
        def mix(self, z):
            return F.scaled_dot_product_attention(*self.heads(z), attn_mask=bias(6, 6)).transpose(1, 2).flatten(2)
    class Plain(Block):
        def mix(self, z):
            return F.scaled_dot_product_attention(*self.heads(z), is_causal=True).transpose(1, 2).flatten(2)
    for mode in ("exact", "diagonal"):
        maps = explain(stack(Causal), dict(z=TOKENS), mode=mode)
        assert not maps.triu(1).any()
        torch.testing.assert_close(maps, explain(stack(Plain), dict(z=TOKENS), mode=mode), rtol=1e-10, atol=1e-10)
    mask = bias(4, 6)
    query, key = TOKENS[:, None, :4], TOKENS[:, None]
    fused = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    with attention_tap(): tapped = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    torch.testing.assert_close(tapped, fused)

# Models without CLS, models with a pool

def test_pools_are_no_blocks():
    pooled = vit(class_token=False, global_pool="map")
    averaged = vit(class_token=False, global_pool="avg")
    with torch.no_grad(), attention_tap() as tap: pooled(PICTURES)
    assert len(tap.attention) == 4
    mixes = [(A.mean(1) + torch.eye(16)) / 2 for A in tap.attention[:3]]
    torch.testing.assert_close(attention_rollout(pooled, PICTURES), mixes[2] @ mixes[1] @ mixes[0])
    with refused("pools its tokens by attention"): class_map(pooled, PICTURES, 3)
    rows = class_map(averaged, PICTURES, 3)
    assert rows.shape == (2, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)) # the mean knows no order of tokens
    averaged.pos_embed.data.zero_()
    blocks = lambda x: x.view(2, 3, 4, 8, 4, 8).transpose(3, 4).reshape(2, 3, 16, 8, 8)
    shuffled = blocks(PICTURES)[:, :, order].view(2, 3, 4, 4, 8, 8).transpose(3, 4).reshape(2, 3, 32, 32)
    torch.testing.assert_close(class_map(averaged, shuffled, 3), class_map(averaged, PICTURES, 3)[:, order])

# Scores that are capped

@pytest.mark.parametrize("mode", ["exact", "diagonal"])
def test_a_cap_that_the_fused_call_drops(mode):
    class Capped(Block):
        def __init__(self): super().__init__(); self.config = transformers.Gemma2Config(attn_logit_softcapping=50.)
    with refused("caps its attention scores"): explain(stack(Capped), dict(z=TOKENS), mode=mode)

# Randomness

def opt():
    sizes = dict(vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=32, dropout=.1, attention_dropout=0.)
    return transformers.OPTModel(config).train()

def mae(): return transformers.ViTMAEModel(transformers.ViTMAEConfig(**child.SIZES, image_size=32, patch_size=8)).eval()

RANDOM = {"functional dropout": (opt, WORDS), "masked patches": (mae, dict(pixel_values=PICTURES)),
          "dropped patches": (lambda: vit(patch_drop_rate=.5).train(), PICTURES)}

@pytest.mark.parametrize("mode", ["exact", "diagonal"])
@pytest.mark.parametrize("what", RANDOM)
def test_random_passes(what, mode):
    build, inputs = RANDOM[what]
    torch.manual_seed(0)
    model = build().double()
    with refused("is random"): explain(model, inputs, mode=mode)

class Forgetful(Block):
    "Another output each time, without asking any of the generators that are known"
    runs = 0
    def forward(self, z): self.runs += 1; return super().forward(z) * (1 + .3 * self.runs)

def test_blocks_that_give_another_output_the_second_time():
    with refused("is random"): explain(stack(Forgetful), dict(z=TOKENS))

# Shapes that coincide

class SequenceFirst(Block):
    def __init__(self): super().__init__(); self.attn = nn.MultiheadAttention(16, 2)
    def mix(self, z): return self.attn(z, z, z, need_weights=False)[0]

def test_tokens_first_where_there_are_as_many_images():
    square = TOKENS.repeat(3, 1, 1) + torch.arange(6.)[:, None, None]
    for mode in ("exact", "diagonal"):
        with refused("mixes what should be images|use mode='exact'"):
            explain(stack(SequenceFirst), dict(z=square), mode=mode)
        with refused("batch first"): explain(stack(SequenceFirst), dict(z=TOKENS), mode=mode)
    model = stack()
    assert off(explain(model, dict(z=square)), model, dict(z=square)) < 1e-8

class Keyword(Block):
    "Tokens come by keyword, after a bias of the same shape"
    def forward(self, bias, stream): return super().forward(stream + 0 * bias)

class KeywordStack(Stack):
    def forward(self, z): return reduce(lambda z, b: b(bias=self.bias, stream=z), self.blocks, z)

def test_a_bias_that_looks_like_tokens():
    torch.manual_seed(0)
    model, plain = shaken(KeywordStack(*(Keyword() for _ in range(3)))), stack()
    plain.load_state_dict(model.state_dict())
    model.bias = TOKENS.flip(0)
    assert torch.equal(latents(model, dict(z=TOKENS), layer=2), latents(plain, dict(z=TOKENS), layer=2))
    assert off(explain(model, dict(z=TOKENS)), plain, dict(z=TOKENS)) < 1e-8

# Where the caller stands

@pytest.mark.parametrize("under", [torch.no_grad, torch.inference_mode])
def test_without_gradients(under):
    model, language = vit(), child.llama()
    def maps():
        pictures, words = PICTURES.clone(), {k: v.clone() for k, v in WORDS.items()}
        return (explain(model, pictures), explain(model, pictures, mode="diagonal"), class_map(model, pictures, 3),
                explain(language, words))
    before = maps()
    with under(): after = maps()
    for a, b in zip(before, after, strict=True): assert torch.equal(a, b) and not b.requires_grad
    if under is torch.inference_mode:
        with under(), refused("built under torch.inference_mode"): explain(stack(), dict(z=TOKENS))

class InPlace(Block):
    def forward(self, z): z += self.mix(z); z += self.mlp(z); return z

def test_blocks_that_write_in_place():
    model, plain = stack(InPlace), stack()
    for mode in ("exact", "diagonal"):
        maps, expected = explain(model, dict(z=TOKENS.clone()), mode=mode), explain(plain, dict(z=TOKENS), mode=mode)
        torch.testing.assert_close(maps, expected, rtol=1e-10, atol=1e-10)
    maps, expected = (explain_attended(m, dict(z=TOKENS.clone()), others=2) for m in (model, plain))
    torch.testing.assert_close(maps, expected, rtol=1e-10, atol=1e-10)

class Checkpointed(Block):
    def forward(self, z): return checkpoint(super().forward, z, use_reentrant=False)

def test_what_keeps_hold_of_the_tap():
    plain = F.scaled_dot_product_attention
    with attention_tap(): kept = F.scaled_dot_product_attention
    assert torch.equal(kept(*[TOKENS[:, None]] * 3), plain(*[TOKENS[:, None]] * 3))
    expected = explain(stack(), dict(z=TOKENS))
    for model in (stack(Checkpointed), torch.compile(stack(), backend="eager")):
        torch.testing.assert_close(explain(model, dict(z=TOKENS)), expected, rtol=1e-10, atol=1e-10)

def test_a_plain_pass_elsewhere_that_met_a_tap_which_closed_before_it_got_to_its_attention():
    met, closed, found = threading.Event(), threading.Event(), []
    def plain():
        attention = F.scaled_dot_product_attention
        met.set(); closed.wait(10)
        found.append(attention(*[TOKENS[:, None]] * 3))
    elsewhere = threading.Thread(target=plain)
    with attention_tap() as tap: elsewhere.start(); met.wait(10)
    closed.set(); elsewhere.join()
    assert not tap.attention and torch.equal(found[0], F.scaled_dot_product_attention(*[TOKENS[:, None]] * 3))

def test_plain_passes_in_other_threads_while_taps_open_and_close():
    model, stop, wrong = vit(), threading.Event(), []
    torch.set_num_threads(1)
    with torch.no_grad(): alone = model(PICTURES)
    def passes():
        while not stop.is_set():
            try:
                with torch.no_grad(): same = torch.equal(model(PICTURES), alone)
            except Exception as e: same = wrong.append(repr(e))
            if same is False: wrong.append("other numbers")
    others = [threading.Thread(target=passes) for _ in range(3)]
    for t in others: t.start()
    for _ in range(3000):
        with attention_tap(): pass
    for _ in range(3): explain(model, PICTURES, mode="diagonal")
    stop.set()
    for t in others: t.join()
    assert not wrong, wrong[:3]

# One line each

@pytest.mark.parametrize("name, size", [("cait_xxs24_224", 224), ("pit_ti_224", 224), ("crossvit_tiny_240", 240)])
def test_class_maps_that_cannot_be(name, size):
    model, x = timm.create_model(name).double().eval(), torch.zeros(1, 3, size, size, dtype=torch.float64)
    with refused("several lists|no fused attention"): class_map(model, x, 3)

def test_siglip_and_whole_clip():
    config = transformers.SiglipVisionConfig(**child.SIZES, image_size=32, patch_size=8)
    siglip = transformers.SiglipVisionModel(config).double().eval()
    with refused("by attention|several lists|one number"): class_map(siglip, dict(pixel_values=PICTURES), 3)
    sight = dict(image_size=32, patch_size=8, width=32, layers=3, head_width=8)
    clip = open_clip.model.CLIP(16, sight, dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1)).eval()
    for call in (attention_rollout, explain):
        with refused("several lists"): call(clip, PICTURES.float())

class Detached(Block):
    def mix(self, z): return super().mix(z).detach()

class Flexible(Block):
    def mix(self, z): return flex_attention(*self.heads(z)).transpose(1, 2).flatten(2)

class Named(Block):
    def forward(self, z): return dict(tokens=super().forward(z))

class WrittenOut(Block):
    def mix(self, z):
        q, k, v = self.heads(z)
        return ((q @ k.mT / 8**.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

UNFOLLOWED = [(Detached, "passes no gradient"), (Flexible, "flex"), (Named, "puts out dict"),
              (WrittenOut, "not supported")]

@pytest.mark.parametrize("block, words", UNFOLLOWED)
@pytest.mark.parametrize("mode", ["exact", "diagonal"])
def test_blocks_that_cannot_be_followed(block, words, mode):
    with refused(words): explain(stack(block), dict(z=TOKENS), mode=mode)

BY_NAME = """
from torch.nn.functional import scaled_dot_product_attention
from test_truth import Block

class ByName(Block):
    def mix(self, z): return scaled_dot_product_attention(*self.heads(z)).transpose(1, 2).flatten(2)
"""

def test_the_call_imported_by_name(tmp_path, monkeypatch):
    (tmp_path / "by_name.py").write_text(BY_NAME)
    monkeypatch.syspath_prepend(tmp_path)
    from by_name import ByName
    with refused("imports the fused call by name"): explain(stack(ByName), dict(z=TOKENS))

@pytest.mark.parametrize("name, sizes, words", [
    ("Gemma2", SIZES | dict(head_dim=8, num_key_value_heads=2), "caps its attention scores"),
    ("GptOss", SIZES | dict(head_dim=8, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2), "sinks"),
    ("GPTJ", dict(vocab_size=50, n_embd=32, n_layer=3, n_head=4, rotary_dim=8), "not supported"),
    ("Bloom", dict(vocab_size=50, hidden_size=32, n_layer=3, n_head=4), "not supported"),
], ids=lambda v: v if isinstance(v, str) and v[0].isupper() else "")
def test_models_whose_library_has_no_fused_attention(name, sizes, words):
    with refused(words): explain(child.causal(name, **sizes), WORDS)

def test_eager_attention_where_sdpa_could_be_had():
    model = child.causal("Llama", "eager", **SIZES)
    with refused("load it with attn_implementation='sdpa'"): explain(model, WORDS)

def test_weights_shared_between_layers():
    model = transformers.AlbertModel(transformers.AlbertConfig(**SIZES, embedding_size=16)).eval()
    with refused("share weights"):
        explain(model, WORDS, blocks=model.encoder.albert_layer_groups[0].albert_layers)
