"""Contribution scores on other architectures, a trained model and long contexts, and the summarize command as a
stranger would run it."""
import io, json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
import child
from ultra_nb.cli import main
from ultra_nb.explanation_maps import latents
from ultra_nb.posts import post, read_posts
from ultra_nb.models import load
from ultra_nb.preliminaries import find_blocks
from ultra_nb.benchmark import per_token_maps
from ultra_nb.summarization import contribution_scores, join, next_token, text_figure, word_scores

ROOT = Path(__file__).parent.parent
KIT = Path(os.environ.get("ULTRA_NB_KIT", ROOT.parent / "shared" / "kit"))
TEXT = "Wörter, 🙂 words: my boss\n\nwants wants wants it. 謝謝!"

@pytest.fixture(scope="module")
def tokenizer():
    "Bytes as they are"
    letters = {c: i for i, c in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_ = Tokenizer(models.BPE(vocab=letters, merges=[]))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>", pad_token="</s>")

MODELS = {
    "Llama, grouped": lambda v: child.llama(vocab_size=v, num_key_value_heads=2),
    "Mistral": lambda v: child.causal("Mistral", **child.SIZES, vocab_size=v, num_key_value_heads=2),
    "Qwen2": lambda v: child.causal("Qwen2", **child.SIZES, vocab_size=v, num_key_value_heads=2),
    "GPT-2": lambda v: child.causal("GPT2", n_embd=32, n_layer=3, n_head=4, vocab_size=v, n_positions=256),
}

def reference(net, tokenizer, context, summary, layer):
    joined = join(tokenizer, context, summary)
    inputs = dict(input_ids=torch.tensor([joined.input_ids]), use_cache=False)
    rows = per_token_maps(net, inputs, find_blocks(net), layer, tokens=range(*joined.summary_span))[0]
    return rows[:, slice(*joined.context_span)].mean(0)

@pytest.mark.parametrize("name", list(MODELS))
def test_scores_are_the_papers_on(name, tokenizer):
    torch.manual_seed(0)
    net = MODELS[name](len(tokenizer)).eval().double()
    for layer in (2, 4):
        expected = reference(net, tokenizer, TEXT, "boss wants", layer)
        found = contribution_scores(net, tokenizer, TEXT, "boss wants", layer)
        assert ((found.scores - expected).abs().max() / expected.max()).item() < 1e-8
        assert "".join(w.text for w in word_scores(found)) == "".join(TEXT.split())
    for side in ("left", "right"):
        tokenizer.padding_side = side
        both = contribution_scores(net, tokenizer, [TEXT, "Short."], ["boss wants", "a longer summary than that"])
        alone = contribution_scores(net, tokenizer, TEXT, "boss wants")
        assert torch.allclose(both[0].scores, alone.scores, atol=1e-10)

@pytest.mark.parametrize("name", list(MODELS))
def test_the_next_token_is_as_likely_as_the_model_says(name, tokenizer):
    torch.manual_seed(0)
    net, inputs = MODELS[name](len(tokenizer)).eval().double(), dict(input_ids=torch.arange(3, 40)[None])
    with torch.no_grad(): likely = net(**inputs).logits[0, :-1].log_softmax(-1)
    own = likely.gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
    torch.testing.assert_close(next_token(net, inputs)(latents(net, inputs))[0, :-1], own)

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."

@pytest.mark.skipif(not KIT.exists(), reason="no folder with real weights")
def test_trained_llama_and_real_posts():
    trained, summary = load(str(KIT / "stories260K")), "Lily played in the park."
    trained.model.double()
    expected = reference(trained.model, trained.tokenizer, STORY, summary, trained.depth + 1)
    found = contribution_scores(trained, trained.tokenizer, STORY, summary)
    assert ((found.scores - expected).abs().max() / expected.max()).item() < 1e-8
    covered = {i for a, b in found.offsets for i in range(a, b)}
    assert covered >= {i for i, c in enumerate(STORY) if c != " "}
    two = sorted(read_posts(KIT / "tldr/tldr_samples.csv"), key=lambda p: len(p.context))[:2]
    for backbone in (trained, load("tldr_llama")):
        net, parts = backbone.model.float(), {}
        for p in two:
            scores = contribution_scores(net, backbone.tokenizer, p.context, p.summary, mode="diagonal", truncate=True)
            parts[f"{p.name}, {backbone.name}"] = scores
        *texts, bar = text_figure(parts).axes
        assert bar.get_ylabel() == "share of the highest score"
        for ax, (title, found) in zip(texts, parts.items(), strict=True):
            assert ax.get_title(loc="left") == title and len(ax.patches) == len(found.context.split())
            assert found.scores.isfinite().all()

LONG = """
import sys, torch
sys.path.insert(0, {root!r})
from ultra_nb.explanation_maps import explain
from ultra_nb.models import load
from ultra_nb.benchmark import resident_memory
from ultra_nb.summarization import explaining_memory
net = load("tldr_llama").model
explain(net, dict(input_ids=torch.randint(800, (1, 16))), mode="diagonal")
before = resident_memory("VmRSS")
explain(net, dict(input_ids=torch.randint(800, (1, 2048))), tokens=range(2020, 2048), mode="diagonal")
print((resident_memory("VmHWM") - before) / 2**30, explaining_memory(net.config, 2048, "diagonal")["total"])
"""

def test_two_thousand_tokens_take_the_memory_that_is_stated():
    done = subprocess.run([sys.executable, "-c", LONG.format(root=str(ROOT))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken, stated = map(float, done.stdout.split())
    assert .4 * stated < taken < 1.3 * stated

@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    "A language model as transformers saves it"
    at = tmp_path_factory.mktemp("language") / "model"
    child.llama(vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(at)
    tokenizer.save_pretrained(at)
    (at / "post.txt").write_text(post(0).context)
    return at

def test_summarize_writes_a_page(folder, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.html"
    argv = ["summarize", str(folder / "post.txt"), "--model", str(folder), "--html", str(page)]
    assert main([*argv, "--summary", "It's <b>bold</b>."]) == 0
    out = capsys.readouterr().out
    assert out.startswith("TL;DR: It's <b>bold</b>.") and out.strip().endswith(str(page))
    assert "&lt;b&gt;bold" in page.read_text() and page.read_text().count("<mark") == len(post(0).context.split())
    assert main(argv) == 1 and "exists already" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("From standard input."))
    argv = ["summarize", "-", "--model", str(folder), "--summary", "s", "--mode", "diagonal", "--layer", "3"]
    assert main([*argv, "--html", str(page), "--force"]) == 0

@pytest.mark.parametrize("said, argv", {
    "the context is empty": ["EMPTY", "--summary", "s"],
    "is not a text in UTF-8": ["BYTES", "--summary", "s"],
    "no file": ["nothing.txt", "--summary", "s"],
    "needs a language model": ["FILE", "--model", "scenes_dino"],
    "more than the model's window of 1024": ["LONG", "--summary", "s"],
    "outside 2..4": ["FILE", "--summary", "s", "--layer", "9"],
    "must end in .html": ["FILE", "--html", "page.txt"],
    "belongs to --scalar next": ["FILE", "--summary", "s", "--reference", "tldr_llama_sft"],
    "has another vocabulary": ["FILE", "--summary", "s", "--scalar", "next", "--reference", "tldr_llama_sft"],
}.items())
def test_summarize_says_what_is_wrong(said, argv, folder, tmp_path, capsys):
    files = dict(EMPTY=b" \n", BYTES=b"\xff\xfe\x00", FILE=b"words", LONG=b"word " * 400)
    for name, content in files.items(): (tmp_path / name).write_bytes(content)
    argv = ["summarize", str(tmp_path / argv[0]), *argv[1:]]
    for option, value in (("--model", folder), ("--html", tmp_path / "page.html")):
        if option not in argv: argv += [option, str(value)]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert said in err.strip().splitlines()[-1] and "Traceback" not in err and not (tmp_path / "page.html").exists()

def test_truncate_keeps_the_summary(folder, tmp_path, capsys):
    text, page = tmp_path / "long.txt", tmp_path / "page.html"
    text.write_text("word " * 400)
    argv = ["summarize", str(text), "--model", str(folder), "--summary", "whole summary", "--truncate"]
    assert main([*argv, "--html", str(page)]) == 0
    assert '"whole", "summary"' in page.read_text() # to be clicked, each with its tokens

def test_train_from_a_settings_file(folder, tmp_path, capsys):
    from ultra_nb.weights import asset
    pairs = tmp_path / "pairs.jsonl"
    rows = [dict(prompt=f"Is {i} a number?", chosen=" It is.", rejected=" No.") for i in range(8)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    quick = dict(max_steps=1, use_cpu=True, bf16=False, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                 disable_tqdm=True)
    for stage, weights in (("sft", "model.safetensors"), ("dpo", "adapter_model.safetensors")):
        file, out = tmp_path / f"{stage}.json", tmp_path / stage
        settings = json.loads(asset(f"{stage}_llama2_7b.json").read_text())
        settings["arguments"] |= quick
        file.write_text(json.dumps(settings))
        argv = ["train", str(file), "--model", str(folder), "--data", str(pairs), "--out", str(out)]
        assert main(argv) == 0
        assert (out / weights).exists()
    last = lambda: capsys.readouterr().err.splitlines()[-1]
    assert main([*argv[:-3], "other.jsonl", *argv[-2:]]) == 1 and "other settings" in last()
    assert main(["train", "nothing.json", "--out", str(tmp_path / "new")]) == 1 and not (tmp_path / "new").exists()
    assert last().endswith("no file nothing.json, and what comes with the package is sft_llama2_7b and dpo_llama2_7b")
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}')
    assert main([*argv[:-1], str(tmp_path / "same")]) == 1
    assert "line 1: chosen and rejected are the same" in last()

def test_configurations_of_accelerate_are_read():
    from accelerate.commands.config.config_args import load_config_from_file
    from ultra_nb.weights import asset
    for name, processes in dict(cpu=1, gpu=1, fsdp=4).items():
        assert load_config_from_file(str(asset(f"accelerate_{name}.yaml"))).num_processes == processes
