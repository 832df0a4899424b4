"""Long-context pretraining of GPT-style language models with attention of linear cost."""

__version__ = "0.1.0"
