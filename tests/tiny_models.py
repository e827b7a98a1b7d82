"""Tiny models with random weights in folders, in the formats of real ones: policies, cross-encoders, late interaction.

The tokenizer of the encoders knows single letters, so that every text of letters has tokens of its own.
"""

import json
import shutil
from pathlib import Path

HIDDEN, PROJECTED = 16, 8
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]


def llama(folder: Path) -> Path:
    """A Llama of two layers with a context of 2,048 tokens. Its tokenizer knows bytes and a few words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["party popper face smile rain sun heart hand red blue cat dog woman man arrow button"] * 4
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *".,!?"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **dict(zip(names, SPECIAL, strict=False)), model_max_length=128
    )


def bert(**settings):
    import torch
    from transformers import BertConfig

    torch.manual_seed(settings.pop("seed", 0))
    return BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,  # Larger than usual, so that scores differ clearly.
        **settings,
    )


def cross_encoder(folder: Path, labels: int = 1, seed: int = 0) -> Path:
    """A cross-encoder as transformers saves it."""
    from transformers import BertForSequenceClassification

    BertForSequenceClassification(bert(num_labels=labels, seed=seed)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def encoder(folder: Path) -> Path:
    """An encoder of single texts as transformers saves it."""
    from transformers import BertModel

    BertModel(bert()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def multi_vector(folder: Path) -> Path:
    """A late-interaction model as sentence-transformers saves it: queries are padded to 12 tokens with [MASK]."""
    import torch
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    parts = encoder(folder.with_name(f"{folder.name}-parts"))
    expansion = {"strategy": "fixed", "attend": False, "length": 12}
    body = Transformer(str(parts), document_length=40, query_expansion=expansion)
    torch.manual_seed(1)
    names = {"module_input_name": "token_embeddings", "activation_function": torch.nn.Identity()}
    project = Dense(HIDDEN, PROJECTED, bias=False, **names)
    mask, normal = MultiVectorMask(list(".,!?")), Normalize(module_input_name="token_embeddings")
    MultiVectorEncoder(modules=[body, project, mask, normal], device="cpu").save(str(folder))
    return folder


def pylate(folder: Path) -> Path:
    """A checkpoint as PyLate saves it, with a class of its own in modules.json. The weights are those of
    :func:`multi_vector`."""
    whole = multi_vector(folder.with_name(f"{folder.name}-whole"))
    shutil.copytree(whole, folder)
    modules = json.loads((folder / "modules.json").read_text())[:2]
    modules[1]["type"] = "pylate.models.Dense.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings |= {"model_type": "ColBERT", "query_length": 12, "document_length": 40, "do_query_expansion": True}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    body = json.loads((folder / "sentence_bert_config.json").read_text())
    for name in ("query_expansion", "document_length"):
        body.pop(name, None)
    (folder / "sentence_bert_config.json").write_text(json.dumps(body))
    return folder


def stanford(folder: Path) -> Path:
    """A checkpoint as Stanford's ColBERT saves it: the projection is among the weights of the model."""
    import torch
    from safetensors.torch import load_file, save_file

    encoder(folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    projection = {"linear.weight": torch.randn(PROJECTED, HIDDEN)}
    whole = {f"bert.{name}": value for name, value in weights.items()} | projection
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["HF_ColBERT"]}))
    (folder / "artifact.metadata").write_text(json.dumps({"query_maxlen": 12, "doc_maxlen": 40}))
    return folder
