"""A random Llama with a 300-word vocabulary, in the shape in which `checkpoint` delivers SmolLM2."""

from __future__ import annotations

from pathlib import Path


def make(directory: Path, layers: int = 2) -> Path:
    """Write it into `directory`, which is returned."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(shape).half().save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w2").save_pretrained(directory)
    return directory
