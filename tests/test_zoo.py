"Architectures as their libraries build them, tiny and random: exact maps against the paper's per-token procedure, in float64."
import pytest, timm, torch, transformers
import open_clip
from ultra_nb.explanation_maps import explain
from ultra_nb.models import find_blocks
from ultra_nb.reproduction import per_token_maps

RNG = torch.Generator().manual_seed(0)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
PICTURE = dict(image_size=32, patch_size=8)
CLIP = dict(embed_dim=16, vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=3, head_width=8), text_cfg=dict(context_length=9, vocab_size=20, width=16, heads=2, layers=3))

def timm_model(name, **kwargs): return timm.create_model(name, img_size=32, depth=3, embed_dim=32, num_heads=4, **kwargs)
def words(vocab=50): return dict(input_ids=torch.randint(3, vocab, (2, 7), generator=RNG))
def padded():
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    return words() | dict(attention_mask=mask)

class Text(torch.nn.Module):
    "open_clip's text transformer on token embeddings, with its causal mask"
    def __init__(self, clip): super().__init__(); self.transformer, self.mask = clip.transformer, clip.attn_mask.double()
    def forward(self, z): return self.transformer(z, attn_mask=self.mask)

ZOO = {
    "timm ViT": lambda: timm_model("vit_tiny_patch16_224", patch_size=8),
    "timm ViT, not square": lambda: timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=3, embed_dim=32, num_heads=4),
    "timm DeiT distilled": lambda: timm_model("deit_tiny_distilled_patch16_224", patch_size=8),
    "timm DINOv2 registers": lambda: timm_model("vit_small_patch14_reg4_dinov2", patch_size=8),
    "timm BEiT": lambda: timm_model("beit_base_patch16_224", patch_size=8),
    "timm EVA-02": lambda: timm_model("eva02_tiny_patch14_224", patch_size=8),
    "open_clip vision": lambda: open_clip.model.CLIP(**CLIP).visual,
    "open_clip QuickGELU": lambda: open_clip.model.CLIP(**CLIP, quick_gelu=True).visual,
    "open_clip text": lambda: Text(open_clip.model.CLIP(**CLIP)),
    "transformers ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, **PICTURE)),
    "transformers DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, **PICTURE)),
    "transformers CLIP vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, **PICTURE)),
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=2)),
    "Llama, padded": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=2)),
    "Mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, vocab_size=50, num_key_value_heads=2)),
    "Qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, vocab_size=50, num_key_value_heads=2)),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4)),
    "BERT": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=50)),
}
LANGUAGE = {"Llama": words, "Llama, padded": padded, "Mistral": words, "Qwen2": words, "GPT-2": words, "BERT": words, "open_clip text": lambda: dict(z=torch.randn(2, 9, 16, generator=RNG, dtype=torch.float64))}

@pytest.mark.parametrize("name", ZOO)
def test_exact_is_the_papers_procedure(name):
    torch.manual_seed(0)
    model = ZOO[name]().double().eval()
    for p in model.parameters(): p.data += 0.1 * torch.randn(p.shape, generator=RNG, dtype=p.dtype) # norms too: without affine part, post-norm BERT would have a constant sum
    size = (32, 48) if "not square" in name else (32, 32)
    inputs = LANGUAGE[name]() if name in LANGUAGE else torch.randn(2, 3, *size, generator=RNG, dtype=torch.float64)
    blocks = find_blocks(model)
    for layer, scalar in ((2, "sum"), (4, "sum"), (4, "energy")):
        ours = explain(model, inputs, layer=layer, scalar=scalar)
        truth = per_token_maps(model, inputs, blocks, layer, scalar)
        assert truth.max() > 1 and ((ours - truth).abs().max() / truth.max()).item() < 1e-8
        if layer == 2: assert ((explain(model, inputs, layer=2, mode="diagonal") - truth).abs().max() / truth.max()).item() < 1e-8
    assert torch.equal(explain(model, inputs, mode="diagonal"), explain(model, inputs, mode="diagonal"))

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
    layer = torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
    class Decoder(torch.nn.Module):
        def __init__(self): super().__init__(); self.layers = torch.nn.ModuleList([layer])
        def forward(self, z): return self.layers[0](z, z)
    with pytest.raises(ValueError, match="called attention 2 times"): explain(Decoder(), dict(z=torch.randn(1, 4, 16, generator=RNG)))
