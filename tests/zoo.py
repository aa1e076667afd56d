"""The judge of `explain`: some five hundred transformers, tiny and random, against eq. 4-6 written out on one graph.

`python tests/zoo.py [--only REGEX] [--jobs 2] [--out RECORD.json]` says for each model and mode whether the maps are
correct, refused in one line, or WRONG. The reference takes nothing from ultra_nb but the list of blocks to explain.
`make zoo` judges all of them, about six minutes on two cores, and renews the record that the README's table is made of.
"""
import argparse, copy, dataclasses, functools, json, multiprocessing, re, signal, time, warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
import open_clip, timm, torch, transformers
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import CausalBias, CausalVariant, causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as bound_early
from torch.overrides import TorchFunctionMode
from ultra_nb.explanation_maps import explain
from ultra_nb.preliminaries import find_blocks

SECONDS = 60 # that a case may take
SCALARS = {"sum": lambda z: z.sum(-1), "energy": lambda z: (z * z).sum(-1)}

# --- the reference -----------------------------------------------------------------------------------------------

def attention(q, k, v, attn_mask=None, dropout_p=0., is_causal=False, scale=None, enable_gqa=False):
    "What PyTorch documents `scaled_dot_product_attention` to do: output, A [B, H, N, N], and what is left of it alone"
    assert not dropout_p
    if enable_gqa: k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1]**-0.5 if scale is None else scale)
    shift = 0
    if isinstance(attn_mask, CausalBias):
        if attn_mask.variant == CausalVariant.LOWER_RIGHT: shift = k.shape[-2] - q.shape[-2]
        is_causal, attn_mask = True, None
    if is_causal: attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(shift)
    if attn_mask is not None and attn_mask.dtype == torch.bool: scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None: scores = scores + attn_mask
    blind = scores.isneginf().all(-1, keepdim=True)
    A = scores.masked_fill(blind, 0.).softmax(-1).masked_fill(blind, 0.)
    if not A.requires_grad: A.requires_grad_()
    own = scores.diagonal(dim1=-2, dim2=-1)[..., None]
    return A @ v, A, lambda: v + own.where(own > -1e9, 0.) # each token hears itself alone, by q, k, v and mask

def tokens_of(args, kwargs):
    "Where a block finds its tokens: position 0, or the name of a keyword"
    if args: return 0
    return "hidden_states" if "hidden_states" in kwargs else next(k for k, v in kwargs.items() if torch.is_tensor(v))

@contextmanager
def watched(blocks, how):
    "Notes what each block gets, gives and attends to. cut: no gradient between blocks; alone: nor between tokens"
    seen = SimpleNamespace(ran=[], raw=[], z=[], last=None, A=[[] for _ in blocks], outside=set())
    inside, fused, index = [], F.scaled_dot_product_attention, {id(b): i for i, b in enumerate(blocks)}
    def enter(block, args, kwargs):
        where = tokens_of(args, kwargs)
        raw = args[0] if where == 0 else kwargs[where]
        z = raw.detach().requires_grad_() if how in ("cut", "alone") else raw
        inside.append(index[id(block)]), seen.ran.append(inside[-1]), seen.raw.append(raw), seen.z.append(z)
        return ((z, *args[1:]), kwargs) if where == 0 else (args, {**kwargs, where: z})
    def leave(block, args, out):
        inside.pop()
        seen.last = out if torch.is_tensor(out) else out[0]
    def noted(*args, **kwargs):
        out, A, own = attention(*args, **kwargs)
        if not inside: seen.outside.add(len(seen.ran))
        else: seen.A[inside[-1]].append(A)
        return own() if how == "alone" and inside else out
    hooks = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    hooks += [b.register_forward_hook(leave) for b in blocks]
    fast, F.scaled_dot_product_attention = torch.backends.mha.get_fastpath_enabled(), fused if how == "fused" else noted
    torch.backends.mha.set_fastpath_enabled(False)
    try: yield seen
    finally:
        F.scaled_dot_product_attention = fused
        torch.backends.mha.set_fastpath_enabled(fast)
        for h in hooks: h.remove()

def call(model, inputs): return model(**inputs) if isinstance(inputs, dict) else model(inputs)

def passed(model, inputs, blocks, how="whole"): # or "cut", "alone", "fused": PyTorch's own attention
    "One forward pass, watched. raw[l - 1] is z^(l), l = 1..L+1; z[l - 1] is the same behind the cut"
    with torch.enable_grad(), watched(blocks, how) as seen: call(model, inputs)
    seen.raw.append(seen.last)
    return seen

def grads(y, xs, cotangent=None):
    return torch.autograd.grad(y, xs, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True)

def undefined(whole, cut, fused, first):
    "Why eq. 4-6 say nothing about these blocks; None when they do. Attention before block `first` is not looked at"
    L, z = len(whole.A), whole.raw
    if whole.ran != list(range(L)): return "the blocks do not run once each, in order"
    if z[0].ndim != 3 or len({t.shape for t in z}) > 1: return "z is not [B, N, D] throughout"
    calls = {len(A) for A in whole.A}
    if calls != {1}: return f"a block calls fused attention {max(calls - {1})} times"
    B, N, _ = z[0].shape
    if any(A.ndim != 4 or A.shape[0] != B or A.shape[2:] != (N, N) for A, in whole.A): return "A is not [B, H, N, N]"
    if whole.outside & set(range(first, L)): return "there is attention before or between the blocks"
    if not torch.allclose(z[-1], fused.raw[-1]): return "two passes differ"
    if any(grads(out[0].sum(), [z])[0][1:].any() for z, out in zip(cut.z, cut.raw[1:], strict=True)):
        return "items of the batch reach each other"

def contribution(A, dA): return (dA.relu() * A).mean(1).detach()

def exact_map(whole, layer, f):
    "Eq. 4-6 as written: for each token the gradient of f(z_i) in every A below, on the graph of the whole model"
    z, As, rows = whole.raw[layer - 1], [A for A, in whole.A[:layer - 1]], []
    for i in range(z.shape[1]):
        row = F.one_hot(torch.tensor(i), z.shape[1]).to(z).expand(z.shape[:2])
        for A, dA in zip(reversed(As), reversed(grads(f(z)[:, i].sum(), As)), strict=True):
            row = row + (row[:, None] @ contribution(A, dA))[:, 0]
        rows.append(row)
    return torch.stack(rows, 1)

def diagonal_map(cut, layer, f):
    "Block by block, on a graph cut between blocks: of each cotangent only the target's own position is kept"
    B, N, _ = cut.raw[0].shape
    rows = []
    for i in range(N):
        own, z = F.one_hot(torch.tensor(i), N).to(cut.raw[0]), cut.raw[layer - 1]
        row, (cotangent,) = own.expand(B, N), grads(f(z)[:, i].sum(), [z])
        for b in reversed(range(layer - 1)):
            (A,), z = cut.A[b], cut.z[b]
            dA, dz = grads(cut.raw[b + 1], (A, z), cotangent)
            row, cotangent = row + row[:, i:i + 1] * contribution(A, dA)[:, i], dz * own[:, None]
        rows.append(row)
    return torch.stack(rows, 1)

def reads_below(cut):
    "Why there is no diagonal map; None when each block reads nothing of the blocks below but its input"
    below = (g for b in range(1, len(cut.z)) for g in grads(cut.raw[b + 1].sum(), cut.z[:b]))
    return "a block reads more of the blocks below than its input" if any(g.any() for g in below) else None

def mixes(alone):
    "Do tokens reach each other by another way than attention?"
    even = (torch.arange(alone.z[0].shape[1]) % 2 == 0).to(alone.z[0])[:, None]
    after = zip(alone.z, alone.raw[1:], strict=True)
    return any(grads((out * even).sum(), [z])[0][:, 1::2].any() for z, out in after)

# --- the judge ---------------------------------------------------------------------------------------------------

class Double(TorchFunctionMode):
    "float32 written into a model's code becomes float64, so that rounding hides nothing"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        swap = lambda v: torch.float64 if v is torch.float32 else v
        if func is torch.Tensor.float: return args[0].double()
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})

def explained(model, inputs, blocks, wanted, mode):
    "The maps of `explain` by layer and scalar or None, the outcome so far, and what it said"
    try: return {(l, s): explain(model, inputs, blocks, l, scalar=s, mode=mode) for l, s in wanted}, "correct", None
    except TimeoutError: raise
    except ValueError as e: outcome, said = "crash" if "\n" in str(e) else "refused", str(e)
    except Exception as e: outcome, said = "crash", f"{type(e).__name__}: {e}"
    return None, outcome, (said.splitlines() or [""])[0][:200]

def error(ours, truth):
    "Largest difference, relative to the largest entry of the truth beside the identity"
    size = (truth - torch.eye(truth.shape[1])).abs().max().item()
    if not size > 1e-6: raise ValueError("the true map is empty")
    off = (ours - truth).abs().max().item() / size if ours.shape == truth.shape else float("inf")
    return off if off == off else float("inf")

def compared(maps, truth):
    "Outcome and error of the maps by layer and scalar"
    worst = max(error(ours, truth(*key)) for key, ours in maps.items())
    limit = 1e-8 if all(m.dtype == torch.float64 for m in maps.values()) else 1e-3
    return "correct" if worst < limit else "WRONG", float(f"{worst:.0e}"), None

def judge(model, inputs, path):
    "{mode: (outcome, error, message)}, and whether tokens reach each other by another way than attention"
    chosen = list(model.get_submodule(path)) if path else None
    try: blocks = chosen or find_blocks(model)
    except ValueError: blocks = []
    layers = {0: [None], 1: [2]}.get(len(blocks), [len(blocks) + 1, len(blocks)])
    given = {"exact": explained(model, inputs, chosen, [(l, s) for l in layers for s in SCALARS], "exact"),
             "diagonal": explained(model, inputs, chosen, [(l, "sum") for l in layers], "diagonal")}
    found = {mode: (outcome, None, said) for mode, (_, outcome, said) in given.items()}
    if all(maps is None for maps, *_ in given.values()): return found, None
    whole, cut, fused = (passed(model, inputs, blocks, how) for how in ("whole", "cut", "fused"))
    why = undefined(whole, cut, fused, 1 if chosen else 0)
    truth = {"exact": (why, lambda l, s: exact_map(whole, l, SCALARS[s])),
             "diagonal": (why or reads_below(cut), lambda l, s: diagonal_map(cut, l, SCALARS[s]))}
    for mode, (why, true) in truth.items():
        maps = given[mode][0]
        if maps: found[mode] = ("WRONG", None, f"there is no true map: {why}") if why else compared(maps, true)
    return found, None if why else mixes(passed(model, inputs, blocks, "alone"))

# --- the zoo -----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Case:
    library: str
    kind: str # of what it reads: pictures, text, sound; or made up
    family: str
    name: str
    build: Callable # to a model and its inputs
    path: str|None = None # of the list of blocks in the model; None: explain finds them

    @property
    def names(self): return dict(library=self.library, kind=self.kind, family=self.family, name=self.name)

def noise(*shape): return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
def ids(*shape): return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(1))
def named(name, path): return f"{name}@{path}" if path else name

PLAIN = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)
FLEXIBLE = dict(patch_size=8, embed_dim=32, depth=3, num_heads=4)
TIMM = [ # arguments, size of the pictures, names
    (PLAIN, 32, """
        aimv2_1b_patch14_224 beit3_base_patch16_224 eva_large_patch14_196 flexivit_base test_vit test_vit2 test_vit3
        test_vit4 vit_base_patch8_224 vit_base_patch14_dinov2 vit_base_patch14_reg1_tipsv2 vit_base_patch14_reg4_dinov2
        vit_base_patch16_18x2_224 vit_base_patch16_18x2_224@blocks vit_base_patch16_224_miil vit_base_patch16_clip_224
        vit_base_patch16_clip_quickgelu_224 vit_base_patch16_gap_224 vit_base_patch16_radio_v3
        vit_base_patch16_reg4_gap_256 vit_base_patch16_rpn_224 vit_base_patch16_siglip_224 vit_base_patch16_xp_224
        vit_base_patch32_siglip_256 vit_base_patch32_siglip_gap_256 vit_betwixt_patch16_gap_256
        vit_betwixt_patch16_reg1_gap_256 vit_betwixt_patch16_reg4_gap_256 vit_dlittle_patch16_reg1_gap_256
        vit_dpwee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_giant_patch14_dinov2
        vit_giant_patch14_reg4_dinov2 vit_huge_patch16_radio_v4 vit_intern300m_patch14_448 vit_pwee_patch16_reg1_gap_256
        vit_so150m2_patch16_reg1_gap_256 vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_map_256
        vit_so400m_patch14_siglip_224 vit_so400m_patch16_siglip_gap_256
        eva02_base_patch14_224 eva02_base_patch16_clip_224 eva02_enormous_patch14_clip_224 eva02_small_patch14_224
        eva_giant_patch14_224 eva_giant_patch14_clip_224 vit_7b_patch16_dinov3 vit_base_patch16_dinov3
        vit_base_patch16_dinov3_qkvb vit_base_patch16_lingbot vit_base_patch16_rope_224 vit_base_patch16_rope_ape_224
        vit_base_patch16_rope_mixed_224 vit_base_patch16_rope_mixed_ape_224 vit_base_patch16_rope_reg1_gap_256
        vit_betwixt_patch16_rope_reg4_gap_256 vit_giant_patch16_lingbot vit_huge_plus_patch16_dinov3
        vit_large_patch16_rope_224 vit_mediumd_patch16_rope_reg1_gap_256 vit_pe_core_base_patch16_224
        vit_pe_core_gigantic_patch14_448 vit_pe_lang_gigantic_patch14_448 vit_pe_spatial_base_patch16_512
        deit3_base_patch16_224 deit_base_distilled_patch16_224 deit_base_patch16_224
        beit_base_patch16_224 beit_large_patch16_224 beitv2_base_patch16_224
        test_vit_relpos vit_relpos_base_patch16_224 vit_relpos_base_patch16_cls_224 vit_relpos_base_patch16_clsgap_224
        vit_relpos_base_patch16_rpn_224 vit_relpos_base_patch32_plus_rpn_256 vit_srelpos_medium_patch16_224
        qwen3_vit_88m qwen3_vit_88m_enc qwen3_vit_88m_merge
        deepseek_vit_412m deepseek_vit_412m_align deepseek_vit_412m_enc
        cait_s24_224 cait_s24_224@blocks convit_tiny xcit_nano_12_p8_224 xcit_nano_12_p8_224@blocks"""),
    (PLAIN | dict(num_kv_heads=2), 32, "vit_5b_patch16_sapiens2 vit_base_patch16_sapiens2"),
    (PLAIN | dict(head_dim=8, intermediate_size=48, pooling_kernel_size=2), 32,
        "gemma4_vit_167m gemma4_vit_167m_enc gemma4_vit_570m gemma4_vit_570m_enc"),
    (PLAIN | dict(window_size=2, global_attn_indexes=()), 32, "samvit_base_patch16"),
    (PLAIN | dict(window_size=0), 32, "samvit_base_patch16_224"),
    (FLEXIBLE, 32, """
        naflexvit_base_patch16_gap naflexvit_base_patch16_map naflexvit_base_patch16_par_gap
        naflexvit_base_patch16_parfac_gap naflexvit_base_patch16_radio_v3 naflexvit_base_patch16_siglip
        naflexvit_so150m2_patch16_reg1_gap naflexvit_so400m_patch16_radio_v4"""),
    (dict(img_size=64, embed_dim=32, depth=3, num_heads=4), 64,
        "vit_base_r50_s16_224 vit_base_resnet26d_224 vit_tiny_r_s16_p8_224"),
    (dict(img_size=64, depth=2), 64, "vitamin_small_224"),
    (dict(img_size=32, embed_dim=32, depth=3, inner_dim=8, num_heads_inner=4, num_heads_outer=4), 32,
        "tnt_s_patch16_224 tnt_s_legacy_patch16_224"),
    (dict(embed_dim=16, stages=(1, 1, 1, 1), window_spec=(8, 4, 4, 2), global_att_blocks=()), 64, "sam2_hiera_tiny"),
    ({}, None, """
        caformer_s18 coat_lite_mini coat_mini coatnet_nano_rw_224 crossvit_9_240 crossvit_9_dagger_240 davit_tiny
        edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 fastvit_sa12
        focalnet_tiny_srf gcvit_xxtiny hiera_tiny_224 iformer_t levit_128s levit_conv_128s maxvit_rmlp_pico_rw_256
        mobilenetv4_hybrid_medium mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small pit_ti_224
        pit_ti_distilled_224 pvt_v2_b0 shvit_s1 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
        swiftformer_xs tiny_vit_5m_224 twins_pcpvt_small twins_svt_small visformer_tiny volo_d1_224 botnet26t_256
        halonet26t lambda_resnet26t csatv2 lowformer_b0 cpubone_b0_bfrobust gmixer_24_224"""),
]

def timm_case(arguments, size, name):
    name, _, path = name.partition("@")
    def build():
        model = timm.create_model(name, num_classes=5, **arguments)
        return model, noise(2, 3, *[size or model.default_cfg["input_size"][-1]] * 2)
    family = timm.models.model_entrypoint(name).__module__.split(".")[-1]
    return Case("timm", "pictures", family, named(name, path), build, path)

def ragged():
    "Patches of two pictures of different size, as NaFlexViT takes them"
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, 12:] = False
    coordinates = torch.stack([y, x], -1).reshape(1, 16, 2).expand(2, -1, -1)
    return timm.create_model("naflexvit_base_patch16_gap", **FLEXIBLE), dict(
        x=noise(2, 16, 192), patch_coord=coordinates, patch_valid=valid)

def wide():
    model = timm.create_model("vit_tiny_patch16_224", **PLAIN | dict(img_size=(32, 48)))
    return model, noise(2, 3, 32, 48)

def words(n=7): return dict(input_ids=ids(2, n))
def padded():
    "Words of which the second row has three tokens of padding on the left"
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    return words() | dict(attention_mask=mask)
def pairs(): return words() | dict(decoder_input_ids=ids(2, 5))
def pictures(): return dict(pixel_values=noise(2, 3, 32, 32))
def unshuffled(): return pictures() | dict(noise=noise(2, 16)) # the noise that a masked autoencoder would draw
def photographs(): return dict(pixel_values=noise(2, 3, 224, 224))
def videos(): return dict(pixel_values=noise(2, 2, 3, 32, 32))
def waves(): return dict(input_values=noise(2, 160))

SIZES = dict( # of a configuration of transformers, under all the names that it may have there
    **dict.fromkeys("""hidden_size d_model n_embd embed_dim emb_dim embedding_size embedding_dim dim_model dim
        projection_dim""".split(), 32),
    **dict.fromkeys("""num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers""".split(), 3),
    **dict.fromkeys("""num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        num_experts num_local_experts n_routed_experts moe_num_experts num_dense_experts index_n_heads""".split(), 4),
    **dict.fromkeys("""num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k
        top_k_experts""".split(), 2),
    **dict.fromkeys("n_group topk_group num_shared_experts n_shared_experts first_k_dense_replace".split(), 1),
    **dict.fromkeys("""intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dim_ff dff d_inner
        ffn_hidden_size hidden_dim""".split(), 48),
    **dict.fromkeys("""moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank
        kv_lora_rank lru_width""".split(), 16),
    **dict.fromkeys("""head_dim d_kv d_head kv_channels attention_head_dim swa_head_dim qk_rope_head_dim dim_head
        qk_nope_head_dim v_head_dim rotary_dim mamba_d_state ssm_state_size state_size index_head_dim
        linear_key_head_dim linear_value_head_dim linear_head_dim""".split(), 8),
    **dict.fromkeys("""sliding_window sliding_window_size window_size local_attention attention_chunk_size
        linear_num_key_heads linear_num_value_heads linear_num_heads""".split(), 4),
    **dict.fromkeys("index_topk keep_window_size num_channels".split(), 3),
    **dict.fromkeys("vocab_size unpadded_vocab_size vocab_size_per_layer_input decoder_vocab_size".split(), 50),
    **dict.fromkeys("max_position_embeddings n_positions n_ctx max_seq_len context_length".split(), 64),
    image_size=32, patch_size=8, layerdrop=0., pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False)
MAMBA = dict(mamba_expand=1, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_chunk_size=4)
WAVES = dict(conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
             num_conv_pos_embedding_groups=2, num_feat_extract_layers=2)
FULL = dict(layer_types=["full_attention"] * 3)
SPECIAL = { # what a type needs besides
    "audio-spectrogram-transformer": dict(max_length=32, num_mel_bins=16, frequency_stride=8, time_stride=8),
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4))),
    "dots3_note_text": dict(swa_q_lora_rank=16, swa_kv_lora_rank=16, swa_num_attention_heads=4, swa_v_head_dim=8,
                            swa_num_key_value_heads=4, swa_head_dim=16, swa_qk_nope_head_dim=8),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=32),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "gpt_neo": dict(attention_types=[[["global", "local", "global"], 1]]),
    "granitemoehybrid": MAMBA | FULL,
    "lfm2_moe": FULL,
    "lilt": dict(hidden_size=48),
    "longcat_flash": dict(zero_expert_num=2, expert_ffn_hidden_size=16),
    "luke": dict(entity_vocab_size=50, entity_emb_size=32),
    "mamba2": dict(expand=1, head_dim=8, n_groups=1, num_heads=4),
    "reformer": dict(is_decoder=True, axial_pos_embds=False, attn_layers=["local", "lsh", "local"], num_buckets=4,
                     local_attn_chunk_length=4, lsh_attn_chunk_length=4, attention_head_size=8),
    "videomae": dict(num_frames=2),
    "vivit": dict(num_frames=2, tubelet_size=[2, 8, 8]),
    "vjepa2": dict(crop_size=32, frames_per_clip=2),
    "wav2vec2-bert": dict(feature_projection_input_dim=16),
    "whisper": dict(max_source_positions=24, num_mel_bins=16),
    "xmod": dict(default_language="en_XX"),
    "yolos": dict(image_size=[32, 32], num_detection_tokens=3),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "linear_attention", "hybrid", "hybrid"]),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
    **dict.fromkeys("""wav2vec2 hubert wavlm data2vec-audio unispeech unispeech-sat sew sew-d
        wav2vec2-conformer""".split(), WAVES),
}
DECODERS = sorted({m.__name__ for c, m in transformers.MODEL_FOR_CAUSAL_LM_MAPPING.items()
                   if not getattr(c, "sub_configs", {})})
TRANSFORMERS = [ # kind, inputs, what to change (None: the library's sizes), names
    ("text", words, {}, " ".join(DECODERS)),
    ("text", padded, {}, """LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Gemma3ForCausalLM GPT2LMHeadModel
        OPTForCausalLM FalconForCausalLM BertModel RobertaModel DistilBertModel ModernBertModel BartForCausalLM
        MixtralForCausalLM DeepseekV3ForCausalLM"""),
    ("text", words, dict(use_sliding_window=True, max_window_layers=1), "Qwen2ForCausalLM"),
    ("text", words, FULL | dict(num_kv_shared_layers=1), "Gemma4ForCausalLM Gemma3nForCausalLM"),
    ("text", words, dict(alibi=True), "FalconForCausalLM"),
    ("text", words, dict(new_decoder_architecture=True), "FalconForCausalLM"),
    ("text", words, dict(multi_query=False), "GPTBigCodeForCausalLM"),
    ("text", words, FULL, "Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM KimiLinearForCausalLM"),
    ("text", words, dict(layer_types=["linear_attention", "full_attention", "linear_attention"]),
        "GraniteMoeHybridForCausalLM"),
    ("text", words, dict(layer_types=["conv", "full_attention", "conv"]), "Lfm2ForCausalLM"),
    ("text", words, {}, """BertModel RobertaModel DistilBertModel AlbertModel ElectraModel DebertaModel DebertaV2Model
        ModernBertModel EuroBertModel NomicBertModel MPNetModel EsmModel CamembertModel XLMRobertaModel ConvBertModel
        SqueezeBertModel MobileBertModel FNetModel FunnelModel LongformerModel BigBirdModel NystromformerModel
        XLNetModel RoFormerModel LayoutLMModel LiltModel CanineModel IBertModel LukeModel MegatronBertModel
        RemBertModel SplinterModel YosoModel MraModel ErnieModel CLIPTextModel SiglipTextModel T5EncoderModel
        UMT5EncoderModel GteModel JinaEmbeddingsV3Model UltrabertModel DPRQuestionEncoder RoCBertModel XmodModel
        Data2VecTextModel ImageGPTModel"""),
    ("text", pairs, {}, """BartModel BartModel@encoder.layers BartModel@decoder.layers T5Model T5Model@encoder.block
        T5Model@decoder.block MarianModel PegasusModel@encoder.layers M2M100Model@encoder.layers LEDModel
        LongT5Model@encoder.block SwitchTransformersModel@encoder.block NllbMoeModel@encoder.layers ProphetNetModel
        FSMTModel"""),
    ("pictures", pictures, {}, """ViTModel DeiTModel BeitModel Data2VecVisionModel Dinov2Model Dinov2WithRegistersModel
        DINOv3ViTModel CLIPVisionModel SiglipVisionModel ViTMAEModel ViTMSNModel IJepaModel YolosModel DPTModel
        PixtralVisionModel Aimv2VisionModel MLCDVisionModel MetaClip2VisionModel ChineseCLIPVisionModel
        AltCLIPVisionModel CLIPSegVisionModel InternVLVisionModel FlavaImageModel PixioModel Sapiens2Model RadioModel
        Tipsv2VisionModel GroupViTVisionModel OwlViTVisionModel Owlv2VisionModel VitDetModel SamVisionModel
        BlipVisionModel MobileViTModel"""),
    ("pictures", photographs, None, """SwinModel Swinv2Model SegformerModel PvtModel PvtV2Model LevitModel CvtModel
        GLPNModel HieraModel"""),
    ("pictures", unshuffled, {}, "ViTMAEModel"),
    ("pictures", lambda: dict(pixel_values=noise(2, 16, 192), spatial_shapes=torch.tensor([[4, 4], [4, 3]]),
                  pixel_attention_mask=(torch.arange(16) < torch.tensor([[16], [12]])).long()),
        dict(num_patches=16), "Siglip2VisionModel"),
    ("pictures", videos, {}, "TimesformerModel VideoMAEModel VivitModel"),
    ("pictures", lambda: dict(pixel_values_videos=noise(2, 2, 3, 32, 32), skip_predictor=True), {}, "VJEPA2Model"),
    ("sound", waves, {}, """Wav2Vec2Model HubertModel WavLMModel Data2VecAudioModel UniSpeechModel UniSpeechSatModel
        SEWModel SEWDModel Wav2Vec2ConformerModel"""),
    ("sound", lambda: dict(input_values=noise(2, 32, 16)), {}, "ASTModel"),
    ("sound", lambda: dict(input_features=noise(2, 24, 16)), {}, "Wav2Vec2BertModel"),
    ("sound", lambda: dict(input_features=noise(2, 16, 48), decoder_input_ids=ids(2, 5)), {},
        "WhisperModel WhisperModel@encoder.layers"),
    ("sound", lambda: dict(input_values=noise(2, 3000), decoder_input_ids=ids(2, 5)), {},
        "MoonshineModel@encoder.layers"),
]

def shrink(config_class, special):
    "A configuration with small numbers for all sizes that it knows"
    known = {f.name for f in dataclasses.fields(config_class)}
    sizes = {k: v for k, v in SIZES.items() if k in known}
    if "kv_lora_rank" in known: sizes["num_key_value_heads"] = 4
    return config_class(**sizes | SPECIAL.get(config_class.model_type, {}) | special)

def with_fused(model_class, config, inputs):
    "The model with fused attention, or with its own where the library will not have that"
    build = functools.partial(model_class._from_config, experts_implementation="eager")
    try:
        model = build(copy.deepcopy(config), attn_implementation="sdpa").eval()
        call(model, inputs)
        return model
    except Exception: return build(config)

def transformers_case(kind, inputs, special, name):
    name, _, path = name.partition("@")
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    def build():
        ins, config = inputs(), config_class() if special is None else shrink(config_class, special)
        return with_fused(model_class, config, ins), ins
    how = [inputs.__name__] * (inputs in (padded, unshuffled)) + [f"{k}={v}" for k, v in (special or {}).items()]
    return Case("transformers", kind, config_class.model_type, ", ".join([named(name, path), *how]), build, path)

CLIP = dict(embed_dim=16, vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=3, head_width=8),
            text_cfg=dict(context_length=9, vocab_size=50, width=32, heads=4, layers=3))

class Text(nn.Module):
    "The text tower of a CLIP of open_clip, as the model itself runs it"
    def __init__(self, clip): super().__init__(); self.clip = clip
    def forward(self, text): return self.clip.encode_text(text)

def open_clip_cases():
    texts, pixels = (lambda: dict(text=ids(2, 9))), (lambda: noise(2, 3, 32, 32))
    def clip(**vision): return open_clip.model.CLIP(**CLIP | dict(vision_cfg=CLIP["vision_cfg"] | vision))
    def custom(**text): return open_clip.model.CustomTextCLIP(**CLIP | dict(text_cfg=CLIP["text_cfg"] | text))
    def case(name, build, inputs, path=None):
        kind = "text" if "text" in name else "pictures"
        return Case("open_clip", kind, "clip", named(name, path), lambda: (build(), inputs()), path)
    return [
        case("visual", lambda: clip().visual, pixels),
        case("visual, QuickGELU", lambda: open_clip.model.CLIP(**CLIP, quick_gelu=True).visual, pixels),
        case("visual, LayerScale", lambda: clip(ls_init_value=1e-5).visual, pixels),
        case("visual, attentional pool", lambda: clip(attentional_pool=True, attn_pooler_heads=4).visual, pixels),
        case("visual, average pool", lambda: clip(pool_type="avg", no_ln_pre=True).visual, pixels),
        case("visual, custom blocks", lambda: clip(block_type="custom", qk_norm=True, scale_heads=True).visual, pixels),
        case("visual, ResNet", lambda: clip(layers=(1, 1, 1, 1), width=16).visual, pixels),
        case("visual, timm", lambda: clip(timm_model_name="test_vit").visual, pixels),
        case("text", lambda: Text(clip()), texts, "clip.transformer.resblocks"),
        case("custom text", lambda: custom().text, texts),
        case("custom text, CLS", lambda: custom(embed_cls=True).text, texts),
        case("custom text, no causal mask", lambda: custom(no_causal_mask=True, pool_type="last").text, texts),
        case("both towers", clip, lambda: dict(image=pixels()) | texts()),
        case("both", clip, lambda: dict(image=pixels()) | texts(), "visual.transformer.resblocks"),
        case("both", clip, lambda: dict(image=pixels()) | texts(), "transformer.resblocks"),
    ]

class Attention(nn.Module):
    "Four heads of 8, fused by any function of q, k and v"
    def __init__(self, fuse, heads=4):
        super().__init__()
        self.fuse, self.wq, self.wo = fuse, nn.Linear(32, 32), nn.Linear(32, 32)
        self.wk, self.wv = nn.Linear(32, 8 * heads), nn.Linear(32, 8 * heads)
    def forward(self, z):
        q, k, v = (w(z).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(self.fuse(q, k, v).transpose(1, 2).flatten(2))

class Block(nn.Module):
    "A plain pre-norm block"
    def __init__(self, *how):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(32), Attention(*how), nn.Linear(32, 32)
    def forward(self, z):
        z = z + self.attn(self.norm(z))
        return z + self.mlp(z).tanh()

class Model(nn.Module):
    "Blocks in a row; `between` acts on the tokens before each block but the first"
    def __init__(self, blocks, between=lambda z: z):
        super().__init__()
        self.blocks, self.between = nn.ModuleList(blocks), between
    def forward(self, src):
        for i, b in enumerate(self.blocks): src = b(self.between(src) if i else src)
        return src

def fuse(**how): return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **how)
def early(q, k, v): return bound_early(q, k, v)
def twice(q, k, v): return F.scaled_dot_product_attention(q, k, v) + bound_early(q, k, v, is_causal=True)
def cumulated(q, k, v): return F.scaled_dot_product_attention(q, k, v.cumsum(2))
def keyed(q, k, v): return F.scaled_dot_product_attention(q, k, v, v.sum(-1)[:, :, None].expand(-1, -1, 7, -1))
def joined(q, k, v):
    return F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in (q, k, v))).unflatten(0, q.shape[:2])

ATTENTIONS = { # what PyTorch's attention takes, and what may be around it
    "is_causal": fuse(is_causal=True), "scale": fuse(scale=0.3), "additive mask": fuse(attn_mask=noise(4, 7, 7)),
    "boolean mask with a blind row": fuse(attn_mask=(noise(7, 7) > 0) & (torch.arange(7) != 2)[:, None]),
    "causal bias, upper left": fuse(attn_mask=causal_upper_left(7, 7)),
    "causal bias, lower right": fuse(attn_mask=causal_lower_right(7, 7)),
    "dropout": fuse(dropout_p=0.1), "heads joined with the batch": joined, "bound early": early,
    "a second one bound early": twice, "values cumulated": cumulated, "mask from the keys' tokens": keyed}
BETWEEN = {"scaled": lambda z: 2 * z + 1, "reversed": lambda z: z.flip(1), "averaged": lambda z: z + z.mean(1, True)}

def torch_cases():
    def case(family, name, build, shape=(2, 7, 32)):
        return Case("torch", "made up", family, name, lambda: (build(), dict(src=noise(*shape))))
    def encoder(**how):
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, **how), 3, enable_nested_tensor=False)
    def blocks(*how): return [Block(*how) for _ in range(3)]
    return [
        *(case("attention", name, lambda f=f: Model(blocks(f))) for name, f in ATTENTIONS.items()),
        case("attention", "grouped queries", lambda: Model(blocks(fuse(enable_gqa=True), 2))),
        *(case("between blocks", name, lambda f=f: Model(blocks(fuse()), f)) for name, f in BETWEEN.items()),
        case("blocks", "one", lambda: Model([Block(fuse())])),
        case("blocks", "one thrice", lambda: Model([Block(fuse())] * 3)),
        case("encoder", "post-norm", lambda: encoder(batch_first=True)),
        case("encoder", "pre-norm", lambda: encoder(batch_first=True, norm_first=True)),
        case("encoder", "tokens first", encoder, (7, 2, 32)),
        case("encoder", "tokens first, as many as items", encoder, (4, 4, 32)),
    ]

@functools.cache
def zoo():
    "All cases, in the order of the tables"
    cases = [timm_case(*how, name) for *how, names in TIMM for name in names.split()]
    cases += [Case("timm", "pictures", "naflexvit", "naflexvit_base_patch16_gap, ragged", ragged),
              Case("timm", "pictures", "vision_transformer", "vit_tiny_patch16_224, not square", wide)]
    cases += [transformers_case(*how, name) for *how, names in TRANSFORMERS for name in names.split()]
    return cases + open_clip_cases() + torch_cases()

# --- the sweep ---------------------------------------------------------------------------------------------------

def shaken(build):
    "The model in float64 with noise on every parameter, so that no zero at the start hides anything, and its inputs"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = build()
    model, rng = model.double().eval(), torch.Generator().manual_seed(0)
    for p in model.parameters(): p.data += 0.1 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    with torch.no_grad(): call(model, inputs)
    return model, inputs

def given(**what): return {k: v for k, v in what.items() if v is not None}
def late(*_): raise TimeoutError(f"more than {SECONDS} s")

def record(index):
    "What became of a case of the zoo, and the seconds it took. Changes the process: run it in one of its own"
    case, start = zoo()[index], time.perf_counter()
    torch.set_num_threads(1), torch.set_default_dtype(torch.float64), warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, late), signal.alarm(SECONDS)
    try:
        with Double(): found, mixing = judge(*shaken(case.build), case.path)
    except Exception as e:
        said = f"{type(e).__name__}: {e}".splitlines()[0][:200]
        found, mixing = dict.fromkeys(("exact", "diagonal"), ("not built", None, said)), None
    finally: signal.alarm(0)
    told = {mode: given(outcome=outcome, error=off, message=said) for mode, (outcome, off, said) in found.items()}
    return given(**case.names, **told, mixes=mixing), time.perf_counter() - start

# --- what the README says of it ----------------------------------------------------------------------------------

REASONS = { # words of a refusal, what it means
    "sinks|caps its": "attention with sinks or capped scores, which the fused call does not have",
    "imports the fused call": "the fused call imported by name, past the tap",
    "made no fused": "attention that is not PyTorch's fused call: written out, linear, recurrent",
    "several lists": "several lists of blocks (stages, encoder and decoder, a whole CLIP): pass one as `blocks=`",
    "no list": "no list of blocks that are alike and hold attention: pass the blocks, or there are none",
    "no tokens|one shape|attention of shape|should be images": "tokens that are merged, windowed, or not [B, N, D]",
    "called attention": "several attentions in one block (cross-attention, parallel attention)",
    "stands between": "something between two blocks (a norm, scale or convolution)",
    "other than its tokens": "keys, values or states that pass from block to block beside the tokens",
    "several times|did not run": "blocks that share weights or do not run",
    "is random": "a random forward pass, also in `eval()`",
    "dropout": "attention dropout",
}
WHERE = {("timm", "pictures"): "timm, vision", ("open_clip", "pictures"): "open_clip, vision",
         ("open_clip", "text"): "open_clip, text", ("transformers", "pictures"): "transformers, vision and video",
         ("transformers", "sound"): "transformers, sound", ("transformers", "text"): "transformers, language"}

def why(message): return next(reason for words, reason in REASONS.items() if re.search(words, message))

def works(cases):
    "Markdown of a record's cases: how many are right, and why the others are refused"
    real = [c for c in cases if (c["library"], c["kind"]) in WHERE]
    tried, worst = len(real), max(c[mode].get("error", 0) for c in real for mode in ("exact", "diagonal"))
    columns = "models", "tried", "types", "exact and diagonal right", "exact right, diagonal refused", "refused"
    rows = [f"""\
`explain` gives a right map, or an error of one line that says why it cannot. `make zoo` checks that: it builds
{tried} small random models as their libraries build them, and compares every exact map with eq. 4-6, and every
diagonal one with its own definition, both written out in float64 without this library. The largest difference is
{worst:.0e} of the largest relevance. A type is a class of models; of some types one configuration works and another is
refused.""", "",
            f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for where, title in WHERE.items():
        some = [c for c in real if (c["library"], c["kind"]) == where]
        n = Counter((c["exact"]["outcome"], c["diagonal"]["outcome"]) for c in some)
        right, exact, refused = n["correct", "correct"], n["correct", "refused"], n["refused", "refused"]
        assert right + exact + refused == len(some), f"{title}: wrong maps or crashes {dict(n)}"
        rows.append(f"| {title} | {len(some)} | {len({c['family'] for c in some})} | {right} | {exact} | {refused} |")
    reasons = {}
    for c in real:
        if c["exact"]["outcome"] == "refused": reasons.setdefault(why(c["exact"]["message"]), []).append(c["family"])
    rows += ["", "| refused | models | among them |", "|---|---|---|"]
    for reason, families in sorted(reasons.items(), key=lambda item: -len(item[1])):
        rows.append(f"| {reason} | {len(families)} | {', '.join(list(dict.fromkeys(families))[:6])} |")
    return "\n".join(rows)

def sweep(cases, jobs):
    "`record` of each case, in order, in processes that are replaced now and then"
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=20) as pool:
        yield from pool.imap(record, cases)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression for library/family/name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", help="JSON file for the record")
    args, start, records = parser.parse_args(), time.perf_counter(), []
    cases = [i for i, c in enumerate(zoo()) if re.search(args.only, f"{c.library}/{c.family}/{c.name}")]
    for r, seconds in sweep(cases, args.jobs):
        records.append(r)
        told = [" ".join(map(str, r[mode].values())) for mode in ("exact", "diagonal")]
        name = f"{r['library']}/{r['family']}/{r['name']}"
        print(name, *told, f"mixes={r.get('mixes')}", f"{seconds:.1f} s", sep=" | ", flush=True)
    n = {mode: dict(sorted(Counter(r[mode]["outcome"] for r in records).items())) for mode in ("exact", "diagonal")}
    print(works(records))
    print(f"{len(records)} models in {(time.perf_counter() - start) / 60:.1f} minutes: {n}")
    if args.out:
        versions = {m.__name__: m.__version__ for m in (open_clip, timm, torch, transformers)}
        cases = ",\n  ".join(map(json.dumps, records)) # a line each
        head = json.dumps(dict(versions=versions, n=n))[:-1]
        Path(args.out).write_text(f'{head},\n "cases": [\n  {cases}]}}\n')

if __name__ == "__main__": main()
