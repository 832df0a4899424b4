"""Tiny tokenizer.json files as published models have them, trained on a few sentences."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SENTENCES = [
    "The old house walked under the green river and saw a small bird, quickly.",
    "naïve 漢字 🐟 in 12 345 rivers; the birds sang to the house of green water.\n\n",
] * 20


def byte_level(path, special=("<|endoftext|>",), vocab_size=400, texts=SENTENCES):
    """As GPT-2, Llama 3 and Qwen have them; its added token <think> is not special, as in Qwen3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.save(str(path))
    return path


def with_fallback(path, prepend=True):
    """As SentencePiece's models look when they are converted: that of Llama 2, or without `prepend` of Gemma."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyzT.,"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a"), ("r", "i"), ("▁", "▁"), ("▁▁", "▁▁")]
    names += [first + second for first, second in merges]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    blanks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prepend else blanks
    spelling = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*spelling, *([decoders.Strip(" ", 1, 0)] if prepend else [])])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(path))
    return path


def change(path, **sections):
    """Set sections of a tokenizer.json: change(path, model={"dropout": 0.1}); other values replace what is there."""
    content = json.loads(path.read_text())
    for name, value in sections.items():
        both = isinstance(content[name], dict) and isinstance(value, dict)
        content[name] = content[name] | value if both else value
    path.write_text(json.dumps(content))
    return path
