"No map is wrong without a word: what a model may do that a tape does not see is followed exactly, or refused in one line."
import threading
import pytest, timm, torch, transformers
import open_clip
import torch.nn.functional as F
from functools import reduce
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from ultra_nb.explanation_maps import explain, latents
from ultra_nb.preliminaries import attention_rollout, attention_tap, class_map, find_blocks
from ultra_nb.reproduction import per_token_maps

WORDS = dict(input_ids=torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0)))
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

def shaken(model, seed=0):
    "In float64 and eval mode, every parameter moved, so that no zero at initialisation hides anything"
    rng = torch.Generator().manual_seed(seed)
    for p in model.double().eval().parameters(): p.data += .1 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return model

def vit(**kwargs):
    torch.manual_seed(0)
    return shaken(timm.create_model("vit_tiny_patch16_224", **dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5) | kwargs))

class Block(nn.Module):
    "A pre-norm block on tokens [B, N, 16]; subclasses change a part of it"
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(16), nn.Linear(16, 48), nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU())
    def heads(self, z): return self.attn(self.norm(z)).view(*z.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
    def mix(self, z): return F.scaled_dot_product_attention(*self.heads(z)).transpose(1, 2).flatten(2)
    def forward(self, z):
        z = z + self.mix(z)
        return z + self.mlp(z)

class Stack(nn.Module):
    def __init__(self, *blocks, between=lambda z: z): super().__init__(); self.blocks, self.between = nn.ModuleList(blocks), between
    def forward(self, z): return reduce(lambda z, b: b(self.between(z)), self.blocks[1:], self.blocks[0](z))

def stack(block=Block, n=3, **kwargs):
    torch.manual_seed(0)
    return shaken(Stack(*(block() for _ in range(n)), **kwargs))

def off(maps, model, inputs, layer=None, scalar="sum"):
    "Largest difference from the paper's procedure on the whole model, relative to the largest relevance"
    blocks = find_blocks(model)
    truth = per_token_maps(model, inputs, blocks, layer or len(blocks) + 1, scalar)
    return ((maps - truth).abs().max() / truth.max()).item()

def refused(call, words):
    with pytest.raises(ValueError, match=words) as caught: call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

# Something between the blocks

@pytest.mark.parametrize("between", [lambda z: 2 * z, lambda z: z.mul_(2), lambda z: F.layer_norm(z, (16,)), lambda z: z.flip(-1), lambda z: z.cumsum(1)],
                         ids=["scale", "scale in place", "norm", "projection", "mixing"])
@pytest.mark.parametrize("mode", ["exact", "diagonal"])
def test_something_between_the_blocks(between, mode):
    model = stack(between=between)
    refused(lambda: explain(model, dict(z=TOKENS), mode=mode), "something stands between")
    refused(lambda: explain(model, dict(z=TOKENS), layer=2, mode=mode), "something stands between") # z^(2) is what enters block 2

def test_a_break_above_the_layer_does_not_matter():
    torch.manual_seed(0)
    model = shaken(Stack(*(Block() for _ in range(4))))
    model.forward = lambda z: model.blocks[3](2 * reduce(lambda z, b: b(z), model.blocks[:3], z))
    for layer in (2, 3): assert off(explain(model, dict(z=TOKENS), layer=layer), model, dict(z=TOKENS), layer) < 1e-8
    for layer in (4, 5): refused(lambda: explain(model, dict(z=TOKENS), layer=layer), "layers up to 3 can be explained")

def test_a_constant_between_blocks_is_followed():
    model = stack(between=lambda z: z + TOKENS)
    for scalar in ("sum", "energy"): assert off(explain(model, dict(z=TOKENS), scalar=scalar), model, dict(z=TOKENS), scalar=scalar) < 1e-8
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
    refused(lambda: explain(twins, x, blocks=twins.blocks[3]), "something stands between|attention of shape")
    parallel = vit(block_fn=timm.models.vision_transformer.ParallelThingsBlock)
    refused(lambda: explain(parallel, PICTURES), "several lists")
    refused(lambda: explain(parallel, PICTURES, blocks=parallel.blocks), "called attention 2 times")
    refused(lambda: explain(parallel, PICTURES, blocks=parallel.blocks[0].attns), "something stands between|does not read|mixes")

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
    refused(lambda: explain(model, dict(z=TOKENS), mode="diagonal"), "use mode='exact'")
    explain(model, dict(z=TOKENS[:1, :1]), mode="diagonal") # one token cannot mix, and says nothing about more
    refused(lambda: explain(model, dict(z=TOKENS), mode="diagonal"), "use mode='exact'")

@pytest.mark.parametrize("name", ["FalconH1", "Doge"])
def test_language_models_that_mix_outside_attention(name):
    torch.manual_seed(0)
    more = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8) if name == "FalconH1" else {}
    config = getattr(transformers, f"{name}Config")(**SIZES, num_key_value_heads=2, **more)
    model = shaken(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))
    assert off(explain(model, WORDS), model, WORDS) < 1e-6
    refused(lambda: explain(model, WORDS, mode="diagonal"), "use mode='exact'")

# Roads beside the tokens

def test_keys_and_values_shared_across_layers():
    torch.manual_seed(0)
    sizes = SIZES | dict(head_dim=8, global_head_dim=8, num_key_value_heads=2, vocab_size_per_layer_input=50, hidden_size_per_layer_input=8, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    for shared in (0, 1):
        config = transformers.Gemma4TextConfig(**sizes, num_kv_shared_layers=shared)
        model = shaken(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))
        for layer in (2, 4, 5):
            if shared and layer == 5: refused(lambda: explain(model, WORDS, layer=5), "other than by its tokens|other than its tokens")
            else: assert off(explain(model, WORDS, layer=layer), model, WORDS, layer) < 1e-6

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
    refused(lambda: explain(model, dict(z=TOKENS)), "layers up to 3")
    model.blocks[2].first = 0.
    assert off(explain(model, dict(z=TOKENS), layer=3), model, dict(z=TOKENS), 3) < 1e-8

# Masks with a meaning of their own

@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_causal_bias(bias):
    class Causal(Block):
        def mix(self, z): return F.scaled_dot_product_attention(*self.heads(z), attn_mask=bias(6, 6)).transpose(1, 2).flatten(2)
    class Plain(Block):
        def mix(self, z): return F.scaled_dot_product_attention(*self.heads(z), is_causal=True).transpose(1, 2).flatten(2)
    for mode in ("exact", "diagonal"):
        maps = explain(stack(Causal), dict(z=TOKENS), mode=mode)
        assert not maps.triu(1).any()
        torch.testing.assert_close(maps, explain(stack(Plain), dict(z=TOKENS), mode=mode), rtol=1e-10, atol=1e-10)
    bias = bias(4, 6)
    query, key = TOKENS[:, None, :4], TOKENS[:, None]
    fused = F.scaled_dot_product_attention(query, key, key, attn_mask=bias)
    with attention_tap(): torch.testing.assert_close(F.scaled_dot_product_attention(query, key, key, attn_mask=bias), fused)

# Models without CLS, models with a pool

def test_pools_are_no_blocks():
    pooled = vit(class_token=False, global_pool="map")
    averaged = vit(class_token=False, global_pool="avg")
    with torch.no_grad(), attention_tap() as tap: pooled(PICTURES)
    assert len(tap.attention) == 4
    mixes = [(A.mean(1) + torch.eye(16)) / 2 for A in tap.attention[:3]]
    torch.testing.assert_close(attention_rollout(pooled, PICTURES), mixes[2] @ mixes[1] @ mixes[0])
    refused(lambda: class_map(pooled, PICTURES, 3), "pools its tokens by attention")
    rows = class_map(averaged, PICTURES, 3)
    assert rows.shape == (2, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)) # the mean knows no order of tokens
    averaged.pos_embed.data.zero_()
    blocks = lambda x: x.view(2, 3, 4, 8, 4, 8).transpose(3, 4).reshape(2, 3, 16, 8, 8)
    shuffled = blocks(PICTURES)[:, :, order].view(2, 3, 4, 4, 8, 8).transpose(3, 4).reshape(2, 3, 32, 32)
    torch.testing.assert_close(class_map(averaged, shuffled, 3), class_map(averaged, PICTURES, 3)[:, order])

# Scores that are capped

def test_a_cap_that_the_fused_call_drops():
    class Capped(Block):
        def __init__(self): super().__init__(); self.config = transformers.Gemma2Config(attn_logit_softcapping=50.)
    for mode in ("exact", "diagonal"): refused(lambda: explain(stack(Capped), dict(z=TOKENS), mode=mode), "caps its attention scores")

# Randomness

def opt(): return transformers.OPTModel(transformers.OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32, dropout=.1, attention_dropout=0.))
def mae(): return transformers.ViTMAEModel(transformers.ViTMAEConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8))

@pytest.mark.parametrize("build, train, inputs", [(opt, True, WORDS), (mae, False, dict(pixel_values=PICTURES)), (lambda: vit(patch_drop_rate=.5), True, PICTURES)], ids=["functional dropout", "masked patches", "dropped patches"])
def test_random_passes(build, train, inputs):
    torch.manual_seed(0)
    model = build().double().train(train)
    for mode in ("exact", "diagonal"): refused(lambda: explain(model, inputs, mode=mode), "is random")

class Forgetful(Block):
    "Another output each time, without asking any of the generators that are known"
    runs = 0
    def forward(self, z): self.runs += 1; return super().forward(z) * (1 + .3 * self.runs)

def test_blocks_that_give_another_output_the_second_time(): refused(lambda: explain(stack(Forgetful), dict(z=TOKENS)), "is random")

# Shapes that coincide

class SequenceFirst(Block):
    def __init__(self): super().__init__(); self.attn = nn.MultiheadAttention(16, 2)
    def mix(self, z): return self.attn(z, z, z, need_weights=False)[0]

def test_tokens_first_where_there_are_as_many_images():
    square = TOKENS.repeat(3, 1, 1) + torch.arange(6.)[:, None, None]
    for mode in ("exact", "diagonal"):
        refused(lambda: explain(stack(SequenceFirst), dict(z=square), mode=mode), "mixes what should be images|use mode='exact'")
        refused(lambda: explain(stack(SequenceFirst), dict(z=TOKENS), mode=mode), "batch first")
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
    model, words = vit(), transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    before = explain(model, PICTURES), explain(model, PICTURES, mode="diagonal"), class_map(model, PICTURES, 3), explain(words, WORDS)
    with under(): after = explain(model, PICTURES.clone()), explain(model, PICTURES.clone(), mode="diagonal"), class_map(model, PICTURES.clone(), 3), explain(words, {k: v.clone() for k, v in WORDS.items()})
    for a, b in zip(before, after): assert torch.equal(a, b) and not b.requires_grad
    with under():
        born = stack()
        if under is torch.inference_mode: refused(lambda: explain(born, dict(z=TOKENS)), "built under torch.inference_mode")

class InPlace(Block):
    def forward(self, z): z += self.mix(z); z += self.mlp(z); return z

def test_blocks_that_write_in_place():
    model, plain = stack(InPlace), stack()
    for mode in ("exact", "diagonal"): torch.testing.assert_close(explain(model, dict(z=TOKENS.clone()), mode=mode), explain(plain, dict(z=TOKENS), mode=mode), rtol=1e-10, atol=1e-10)

class Checkpointed(Block):
    def forward(self, z): return checkpoint(super().forward, z, use_reentrant=False)

def test_what_keeps_hold_of_the_tap():
    plain = F.scaled_dot_product_attention
    with attention_tap(): kept = F.scaled_dot_product_attention
    assert torch.equal(kept(*[TOKENS[:, None]] * 3), plain(*[TOKENS[:, None]] * 3))
    torch.testing.assert_close(explain(stack(Checkpointed), dict(z=TOKENS)), explain(stack(), dict(z=TOKENS)), rtol=1e-10, atol=1e-10)
    compiled = torch.compile(stack(), backend="eager")
    torch.testing.assert_close(explain(compiled, dict(z=TOKENS)), explain(stack(), dict(z=TOKENS)), rtol=1e-10, atol=1e-10)

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

def small(name, **kwargs): return timm.create_model(name, **kwargs).double().eval()

@pytest.mark.parametrize("name", ["cait_xxs24_224", "pit_ti_224", "crossvit_tiny_240"])
def test_class_maps_that_cannot_be(name): refused(lambda: class_map(small(name), torch.zeros(1, 3, *([240] * 2 if "cross" in name else [224] * 2), dtype=torch.float64), 3), "several lists|no fused attention")

def test_siglip_and_whole_clip():
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)).double().eval()
    refused(lambda: class_map(siglip, dict(pixel_values=PICTURES), 3), "by attention|several lists|one number")
    clip = open_clip.model.CLIP(16, dict(image_size=32, patch_size=8, width=32, layers=3, head_width=8), dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1)).eval()
    for call in (attention_rollout, explain): refused(lambda: call(clip, PICTURES.float()), "several lists")

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

@pytest.mark.parametrize("block, words", [(Detached, "passes no gradient"), (Flexible, "flex"), (Named, "puts out dict"), (WrittenOut, "not supported")])
@pytest.mark.parametrize("mode", ["exact", "diagonal"])
def test_blocks_that_cannot_be_followed(block, words, mode): refused(lambda: explain(stack(block), dict(z=TOKENS), mode=mode), words)

def test_the_call_imported_by_name(tmp_path, monkeypatch):
    (tmp_path / "by_name.py").write_text("from torch.nn.functional import scaled_dot_product_attention\nfrom test_truth import Block\nclass ByName(Block):\n    def mix(self, z): return scaled_dot_product_attention(*self.heads(z)).transpose(1, 2).flatten(2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    from by_name import ByName
    refused(lambda: explain(stack(ByName), dict(z=TOKENS)), "imports the fused call by name")

def language(name, **more):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**SIZES | more)).eval()

@pytest.mark.parametrize("name, more, words", [
    ("Gemma2", dict(head_dim=8, num_key_value_heads=2), "caps its attention scores"),
    ("GptOss", dict(head_dim=8, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2), "sinks"),
    ("GPTJ", dict(n_embd=32, n_layer=3, n_head=4, rotary_dim=8), "not supported"),
    ("Bloom", dict(n_layer=3, n_head=4), "not supported"),
], ids=lambda v: v if isinstance(v, str) and v[0].isupper() else "")
def test_models_whose_library_has_no_fused_attention(name, more, words):
    drop = {"GPTJ": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), "Bloom": ("intermediate_size", "num_hidden_layers", "num_attention_heads")}.get(name, ())
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**{k: v for k, v in SIZES.items() if k not in drop} | more)).eval()
    refused(lambda: explain(model, WORDS), words)

def test_eager_attention_where_sdpa_could_be_had():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES), attn_implementation="eager").eval()
    refused(lambda: explain(model, WORDS), "load it with attn_implementation='sdpa'")

def test_weights_shared_between_layers():
    model = transformers.AlbertModel(transformers.AlbertConfig(vocab_size=50, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)).eval()
    layers = model.encoder.albert_layer_groups[0].albert_layers
    refused(lambda: explain(model, WORDS, blocks=layers), "share weights")
