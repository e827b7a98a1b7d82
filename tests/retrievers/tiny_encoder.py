"""A random encoder of one layer, small enough that a test can tune it."""

from collections.abc import Iterable
from pathlib import Path


def tiny_encoder(folder: Path, texts: Iterable[str]) -> Path:
    """Save a BERT of 16 dimensions whose vocabulary is the words of ``texts``, and return the folder.

    Its position embeddings are 0, so that texts with the same words have nearly the same embedding.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = pre_tokenizers.Whitespace()
    found = sorted({word for text in texts for word, _ in words.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *found])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = words
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(vocabulary), pad_token_id=0, **shape), add_pooling_layer=False)
    torch.nn.init.zeros_(model.embeddings.position_embeddings.weight)
    bare = folder.with_name(f"{folder.name}-bare")
    model.save_pretrained(bare)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(bare)
    body = Transformer(str(bare))
    pooled = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), "mean")], device="cpu")
    pooled.save_pretrained(str(folder), create_model_card=False)
    return folder
