"""A shop with brands whose runs have the action `structured`: its files, the settings of its runs, and a policy that
writes queries in parts."""

import random
from pathlib import Path

STRUCTURED = [
    "format.action=structured", "format.answer=json", "format.prompt=null", "format.keep_query=false",
    "format.repeat=1",
]  # fmt: skip
TINY = [
    "evaluation.validation_limit=4", "evaluation.metrics=[ndcg@10]", "evaluation.every_steps=0", "prompts_per_step=2",
    "grpo.max_completion_length=4", "grpo.num_generations=4", "grpo.disable_tqdm=true", "grpo.logging_steps=1",
    "grpo.bf16=false", "model.dtype=float32", "lora={r: 4, target_modules: [q_proj, v_proj]}", "grpo.save_steps=2",
    "task.train_filter.raw_ndcg_below=1.01",
]  # fmt: skip
SERVING = "retriever.params={fields: {title: 2, text: 1}, structured: {filters: [brand]}}"
FILTERED = '<answer>{"query": "shoe", "filters": {"brand": "Acme"}}</answer>'
BOOSTED = '<answer>{"query": "boot rain", "boosts": {"title": 4}}</answer>'
NARROW = '<answer>{"query": "hat", "must": ["red"], "filters": {"brand": ["Solvei", "Ostrava Works"]}}</answer>'
UNKNOWN = '<answer>{"query": "belt", "filters": {"price": "9"}}</answer>'
NO_JSON = "no JSON"
# What `writer` answers to a query by its last character: its greedy answer, and another that it may sample.
ANSWERS = {"0": (FILTERED, NO_JSON), "1": (BOOSTED, FILTERED), "2": (NO_JSON, BOOSTED), "3": (UNKNOWN, NARROW)}


def make_shop(folder: Path) -> Path:
    """A catalogue with brands, and judged queries of which the filter by a brand is the answer."""
    chance = random.Random(0)
    kinds, brands = ["shoe", "boot", "sock", "hat", "coat", "belt"], ["Acme", "Solvei", "Ostrava Works"]
    items, judged = ["id,title,brand,description"], ["query,item,grade"]
    for i in range(120):
        kind, brand = kinds[i % 6], brands[i // 6 % 3]
        items.append(f"p{i},{chance.choice(['red', 'blue'])} {kind},{brand},{kind} number {i} for rain")
        judged.append(f"{kind} by {brand} {i % 4},p{i},1")
    (folder / "items.csv").write_text("\n".join(items))
    (folder / "judgments.csv").write_text("\n".join(judged))
    return folder


def settings(shop: Path, *more: str) -> list[str]:
    return [
        "task.name=catalog", f"task.path={shop}", "retriever.kind=bm25",
        "task.params={text: [description], fields: [brand]}", *STRUCTURED, *TINY, *more,
    ]  # fmt: skip


def writer(folder: Path, plain: Path) -> Path:
    """A policy that writes queries in parts without training: its answer depends on the last token of its prompt alone.

    Each answer is one token. The embeddings are unit vectors, and the layers add nothing to them, so that the head is
    a table of what follows each token.

    folder: where it is saved.
    plain: a model, whose tokenizer it gets.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.add_tokens(sorted({answer for pair in ANSWERS.values() for answer in pair}))
    size = len(tokenizer) + len(tokenizer) % 2
    shape = {"hidden_size": size, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=2048, **shape, **special))
    layer = model.model.layers[0]
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight[tokenizer.eos_token_id] = 0.5  # It ends where nothing else is likely.
        for last, pair in ANSWERS.items():
            (token,) = tokenizer.encode(last, add_special_tokens=False)
            for answer, height in zip(pair, (1.0, 0.97), strict=True):
                model.lm_head.weight[tokenizer.convert_tokens_to_ids(answer), token] = height
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
